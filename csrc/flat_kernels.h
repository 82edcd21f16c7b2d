// Element-wise work on flat arrays, without planes or bins. Included after simd_elements.h, inside
// a namespace once per instruction set, hence no includes.

// What is summed of s - t.
enum class Flat {
  squares,
  magnitudes,
  pooled,  // squares; forward also writes the differences, backward adds offsets
};

template <Flat kKind, int kVectors, typename V, typename T>
DISTPRO_INLINE void forward_step(const T* s, const T* t, Accumulation<T>* differences, V* sums) {
  for (int v = 0; v < kVectors; ++v) {
    constexpr int kStep = sizeof(V) / sizeof(Accumulation<T>);
    const V d = read<V>(s + v * kStep) - read<V>(t + v * kStep);
    if (kKind == Flat::pooled) write(differences + v * kStep, d);
    sums[v] += kKind == Flat::magnitudes ? (d < 0 ? -d : d) : d * d;
  }
}

// The sum of (s - t)^2, or of |s - t|: short vector sums, each of which is added to a double.
template <Flat kKind, typename T>
double forward_flat(const T* s, const T* t, std::int64_t size,
                    Accumulation<T>* differences = nullptr) {
  using A = Accumulation<T>;
  using V = Vector<T>;
  constexpr int kVectors = 4, kStep = kVectors * kLanes<T>;
  double total = 0;
  std::int64_t i = 0;
  while (i + kStep <= size) {
    const std::int64_t end = i + 256 * kStep < size ? i + 256 * kStep : size;
    V sums[kVectors] = {};
    for (; i + kStep <= end; i += kStep) {
      forward_step<kKind, kVectors>(s + i, t + i, differences + i, sums);
    }
    total += sum_of<A>(sums[0] + sums[1] + (sums[2] + sums[3]));
  }
  V sum = {};
  for (; i + kLanes<T> <= size; i += kLanes<T>) {
    forward_step<kKind, 1>(s + i, t + i, differences + i, &sum);
  }
  A rest = 0;
  for (; i < size; ++i) forward_step<kKind, 1>(s + i, t + i, differences + i, &rest);
  return total + sum_of<A>(sum) + rest;
}

template <Flat kKind, typename V, typename T>
DISTPRO_INLINE void backward_step(const T* s, const T* t, T* gradient, Accumulation<T> scale,
                                  const Accumulation<T>* offsets) {
  const V d = read<V>(s) - read<V>(t);
  if (kKind == Flat::pooled) {
    write(gradient, scale * d + read<V>(offsets));
  } else if (kKind == Flat::squares) {
    write(gradient, scale * d);
  } else {  // propagates NaN
    write(gradient, d > 0 ? V{} + scale : d < 0 ? V{} - scale : d * scale);
  }
}

// gradient = scale * (s - t), or scale * sign(s - t)
template <Flat kKind, typename T>
void backward_flat(const T* s, const T* t, T* gradient, std::int64_t size, Accumulation<T> scale,
                   const Accumulation<T>* offsets = nullptr) {
  std::int64_t i = 0;
  for (; i + kLanes<T> <= size; i += kLanes<T>) {
    backward_step<kKind, Vector<T>>(s + i, t + i, gradient + i, scale, offsets + i);
  }
  for (; i < size; ++i) {
    backward_step<kKind, Accumulation<T>>(s + i, t + i, gradient + i, scale, offsets + i);
  }
}
