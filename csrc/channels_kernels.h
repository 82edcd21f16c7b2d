// Channels of one image [H, W, C] with the bins of an HCL. Included after simd_elements.h, inside a
// namespace once per instruction set, hence no includes.
//
// Works rectangle by rectangle (see geometry.h) on a few vectors of channels at a time, so that a
// rectangle's sums stay in registers: with the sums in memory, each pixel waited for the previous
// pixel's store.

// Vectors of channels at a time: 8 in the 32 registers of AVX-512, 4 in the 16 of AVX2.
constexpr int kVectorsTogether = kVectorBytes / 8;

// Elements to prefetch ahead: to the next row of rectangles if it is near, else to the next
// rectangle.
template <typename T>
DISTPRO_INLINE std::int64_t ahead_of(const Geometry& g, int i, int j) {
  constexpr std::int64_t kNear = 16384 / sizeof(T);
  const std::int64_t band = (g.rows.edge[i + 1] - g.rows.edge[i]) * g.w * g.c;
  return band <= kNear ? band : (g.columns.edge[j + 1] - g.columns.edge[j]) * g.c;
}

// Rectangle (i, j) for some channels: adds its sums to the bins that contain it, of which bin b is
// at bins[b * stride], and its squares to `total`.
template <int kVectors, typename V, typename T>
DISTPRO_INLINE void forward_rectangle(const Geometry& g, int i, int j, const T* s, const T* t,
                                      Accumulation<T>* bins, std::int64_t stride, V& total) {
  constexpr int kStep = sizeof(V) / sizeof(Accumulation<T>);
  const std::int64_t ahead = ahead_of<T>(g, i, j);
  V sums[kVectors] = {}, squares[kVectors] = {};
  for (std::int64_t y = g.rows.edge[i]; y < g.rows.edge[i + 1]; ++y) {
    for (std::int64_t x = g.columns.edge[j]; x < g.columns.edge[j + 1]; ++x) {
      const std::int64_t pixel = (y * g.w + x) * g.c;
      prefetch(s + pixel + ahead, kVectors * kStep);
      prefetch(t + pixel + ahead, kVectors * kStep);
      for (int v = 0; v < kVectors; ++v) {
        const V d = read<V>(s + pixel + v * kStep) - read<V>(t + pixel + v * kStep);
        sums[v] += d;
        squares[v] += d * d;
      }
    }
  }
  const BinList& containing = g.bins_containing[i][j];
  for (int k = 0; k < containing.count; ++k) {
    Accumulation<T>* bin = bins + containing.bin[k] * stride;
    for (int v = 0; v < kVectors; ++v) {
      write(bin + v * kStep, read<V>(bin + v * kStep) + sums[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) total += squares[v];
}

template <int kVectors, typename V, typename T>
DISTPRO_INLINE void backward_rectangle(const Geometry& g, int i, int j, const T* s, const T* t,
                                       T* gradient, const Accumulation<T>* bins,
                                       Accumulation<T> scale, const Accumulation<T>* factors) {
  constexpr int kStep = sizeof(V) / sizeof(Accumulation<T>);
  const std::int64_t ahead = ahead_of<T>(g, i, j);
  V offsets[kVectors] = {};
  const BinList& containing = g.bins_containing[i][j];
  for (int k = 0; k < containing.count; ++k) {
    const int b = containing.bin[k];
    for (int v = 0; v < kVectors; ++v) {
      offsets[v] += factors[b] * read<V>(bins + b * g.c + v * kStep);
    }
  }
  for (std::int64_t y = g.rows.edge[i]; y < g.rows.edge[i + 1]; ++y) {
    for (std::int64_t x = g.columns.edge[j]; x < g.columns.edge[j + 1]; ++x) {
      const std::int64_t pixel = (y * g.w + x) * g.c;
      prefetch(s + pixel + ahead, kVectors * kStep);
      prefetch(t + pixel + ahead, kVectors * kStep);
      for (int v = 0; v < kVectors; ++v) {
        const std::int64_t at = pixel + v * kStep;
        write(gradient + at, scale * (read<V>(s + at) - read<V>(t + at)) + offsets[v]);
      }
    }
  }
}

// Turns sums into means, in place, and adds their squares to `total`.
template <typename V, typename A>
DISTPRO_INLINE void finish_bin(A* bin, A inverse, V& total) {
  const V mean = inverse * read<V>(bin);
  write(bin, mean);
  total += mean * mean;
}

template <typename T>
double forward_channels(const Geometry& g, const T* s, const T* t, std::int64_t channels,
                        Accumulation<T>* bins, std::int64_t stride) {
  using A = Accumulation<T>;
  using V = Vector<T>;
  constexpr int kStep = kLanes<T>, kWide = kVectorsTogether * kStep;
  for (int b = 0; b < g.bins; ++b) {
    for (std::int64_t k = 0; k < channels; ++k) bins[b * stride + k] = 0;
  }
  double loss = 0;
  for (int i = 0; i < g.rows.segments; ++i) {
    V total = {};
    A rest = 0;
    for (int j = 0; j < g.columns.segments; ++j) {
      std::int64_t k = 0;
      for (; k + kWide <= channels; k += kWide) {
        forward_rectangle<kVectorsTogether>(g, i, j, s + k, t + k, bins + k, stride, total);
      }
      for (; k + kStep <= channels; k += kStep) {
        forward_rectangle<1>(g, i, j, s + k, t + k, bins + k, stride, total);
      }
      for (; k < channels; ++k) {
        forward_rectangle<1>(g, i, j, s + k, t + k, bins + k, stride, rest);
      }
    }
    loss += g.element_weight * (sum_of<A>(total) + rest);
  }
  for (int l = 0; l < g.levels; ++l) {
    for (int b = g.first_bin[l]; b < g.first_bin[l] + g.level[l] * g.level[l]; ++b) {
      const A inverse = static_cast<A>(g.inverse_area[b]);
      A* bin = bins + b * stride;
      V total = {};
      A rest = 0;
      std::int64_t k = 0;
      for (; k + kStep <= channels; k += kStep) finish_bin(bin + k, inverse, total);
      for (; k < channels; ++k) finish_bin(bin + k, inverse, rest);
      loss += g.bin_weight[l] * (sum_of<A>(total) + rest);
    }
  }
  return loss;
}

template <typename T>
void backward_channels(const Geometry& g, const T* s, const T* t, T* gradient,
                       std::int64_t channels, const Accumulation<T>* bins, double coefficient) {
  using A = Accumulation<T>;
  using V = Vector<T>;
  constexpr int kStep = kLanes<T>, kWide = kVectorsTogether * kStep;
  const A scale = static_cast<A>(2 * coefficient * g.element_weight);
  A factors[kMaxBins];
  for (int b = 0; b < g.bins; ++b) factors[b] = static_cast<A>(coefficient * g.gradient_factor[b]);
  for (int i = 0; i < g.rows.segments; ++i) {
    for (int j = 0; j < g.columns.segments; ++j) {
      std::int64_t k = 0;
      for (; k + kWide <= channels; k += kWide) {
        backward_rectangle<kVectorsTogether, V>(g, i, j, s + k, t + k, gradient + k, bins + k,
                                                scale, factors);
      }
      for (; k + kStep <= channels; k += kStep) {
        backward_rectangle<1, V>(g, i, j, s + k, t + k, gradient + k, bins + k, scale, factors);
      }
      for (; k < channels; ++k) {
        backward_rectangle<1, A>(g, i, j, s + k, t + k, gradient + k, bins + k, scale, factors);
      }
    }
  }
}
