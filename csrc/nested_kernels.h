// Dense planes whose bins nest: the levels' bins are sums of the finest level's, as wherever it
// divides H and W. Included after storage.h, inside a namespace once per instruction set: no
// includes.
//
// Planes go in batches, so that the short sums at the end of each become long loops: first a sum
// per column and band of rows, then pairs of columns until one number is left for each finest bin.

constexpr std::int64_t kBatch = 2048;  // sums of a batch: 8 KB of float, which stay in L1

DISTPRO_INLINE std::int64_t batch_of(const Geometry& g) {
  const std::int64_t planes = kBatch / (g.level[0] * g.w);
  return planes < 1 ? 1 : planes;
}

// Sums of the columns of one band of rows, and of squares on top of what `squares` holds; kWidth 0:
// any width, else vectors in registers.
template <int kWidth, typename T>
DISTPRO_INLINE void forward_band(const T* s, const T* t, std::int64_t rows, std::int64_t width,
                                 Accumulation<T>* __restrict sums,
                                 Accumulation<T>* __restrict squares) {
  using A = Accumulation<T>;
  if constexpr (kWidth == 0) {
    for (std::int64_t x = 0; x < width; ++x) sums[x] = 0;
    for (std::int64_t y = 0; y < rows; ++y, s += width, t += width) {
      accumulate_run(s, t, width, sums, squares);
    }
  } else {
    using V = Vector<T>;
    constexpr int kLanes = sizeof(V) / sizeof(A), kVectors = kWidth / kLanes;
    V sum[kVectors], square[kVectors];
    for (int v = 0; v < kVectors; ++v) sum[v] = V{}, square[v] = load_vector(squares + v * kLanes);
    for (std::int64_t y = 0; y < rows; ++y, s += kWidth, t += kWidth) {
      for (int v = 0; v < kVectors; ++v) {
        const V d = load_vector(s + v * kLanes) - load_vector(t + v * kLanes);
        sum[v] += d;
        square[v] += d * d;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      store_vector(sums + v * kLanes, sum[v]);
      store_vector(squares + v * kLanes, square[v]);
    }
  }
}

// out[i] = the sum of the i-th run of `width` numbers; returns where it is, `from` or `spare`.
template <typename A>
A* sum_runs(A* __restrict from, A* __restrict spare, std::int64_t runs, std::int64_t width) {
  for (; width % 2 == 0; width /= 2) {
    for (std::int64_t i = 0; i < runs * width / 2; ++i) spare[i] = from[2 * i] + from[2 * i + 1];
    A* swap = from;
    from = spare;
    spare = swap;
  }
  if (width == 1) return from;
  for (std::int64_t i = 0; i < runs; ++i) {
    A sum = 0;
    for (std::int64_t x = 0; x < width; ++x) sum += from[i * width + x];
    spare[i] = sum;
  }
  return spare;
}

// out[i * width ...] = from[i], `width` times; returns where it is.
template <typename A>
A* spread_runs(A* __restrict from, A* __restrict spare, std::int64_t runs, std::int64_t width) {
  std::int64_t odd = width;
  while (odd % 2 == 0) odd /= 2;
  if (odd > 1) {
    for (std::int64_t i = 0; i < runs; ++i) {
      for (std::int64_t x = 0; x < odd; ++x) spare[i * odd + x] = from[i];
    }
    A* swap = from;
    from = spare;
    spare = swap;
  }
  for (; odd < width; odd *= 2) {
    for (std::int64_t i = 0; i < runs * odd; ++i) spare[2 * i] = spare[2 * i + 1] = from[i];
    A* swap = from;
    from = spare;
    spare = swap;
  }
  return from;
}

// Means of all levels of `planes` planes from sums over the finest bins, [kLevel * kLevel] a plane;
// `squares` takes the sum of squared means of each level.
template <int kLevel, typename A>
void nested_means(const Geometry& g, const A* __restrict sums, std::int64_t planes,
                  A* __restrict means, double* squares) {
  const A fine = static_cast<A>(1 / g.area[0]);
  A square = 0, square2 = 0, square1 = 0;
  for (std::int64_t p = 0; p < planes; ++p, sums += kLevel * kLevel, means += g.bins) {
    A part[4] = {};
    for (int k = 0; k < kLevel * kLevel; ++k) {
      const A mean = sums[k] * fine;
      means[k] = mean;
      part[k % 4] += mean * mean;
    }
    square += part[0] + part[1] + part[2] + part[3];
    if constexpr (kLevel == 4) {
      A sum = 0;
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {
          const A* corner = means + 8 * i + 2 * j;
          const A mean = (corner[0] + corner[1] + corner[4] + corner[5]) / 4;
          means[16 + 2 * i + j] = mean;
          square2 += mean * mean;
          sum += mean;
        }
      }
      means[20] = sum / 4;
      square1 += means[20] * means[20];
    } else if constexpr (kLevel == 2) {
      means[4] = (means[0] + means[1] + means[2] + means[3]) / 4;
      square2 += means[4] * means[4];
    }
  }
  squares[0] += square, squares[1] += square2, squares[2] += square1;
}

template <int kWidth, typename T>
double forward_nested(const Geometry& g, const T* s, const T* t, std::int64_t planes,
                      Accumulation<T>* kept, Accumulation<T>* scratch) {
  using A = Accumulation<T>;
  const std::int64_t bands = g.level[0], rows = g.h / bands, batch = batch_of(g);
  A* squares = scratch;
  A* sums = squares + g.w;
  A* spare = sums + batch * bands * g.w;
  A* means = spare + batch * bands * g.w;
  double square = 0, of_means[kMaxLevels] = {};
  for (std::int64_t first = 0; first < planes; first += batch) {
    const std::int64_t count = planes - first < batch ? planes - first : batch;
    for (std::int64_t x = 0; x < g.w; ++x) squares[x] = 0;
    for (std::int64_t b = 0; b < count * bands; ++b) {
      forward_band<kWidth>(s, t, rows, g.w, sums + b * g.w, squares);
      s += rows * g.w;
      t += rows * g.w;
    }
    for (std::int64_t x = 0; x < g.w; ++x) square += squares[x];
    const A* bins = sum_runs(sums, spare, count * bands * bands, g.w / bands);
    A* out = kept ? kept + first * g.bins : means;
    if (bands == 4) nested_means<4>(g, bins, count, out, of_means);
    if (bands == 2) nested_means<2>(g, bins, count, out, of_means);
    if (bands == 1) nested_means<1>(g, bins, count, out, of_means);
  }
  double loss = g.full * square;
  for (int l = 0; l < g.levels; ++l) loss += g.square[g.first_bin[l]] * of_means[l];
  return loss;
}

// What all levels together add to the gradient in each of the finest bins.
template <int kLevel, typename A>
void nested_offsets(const Geometry& g, const A* __restrict means, std::int64_t planes,
                    double coefficient, A* __restrict offsets) {
  A scale[kMaxLevels] = {};
  for (int l = 0; l < g.levels; ++l) {
    const int b = g.first_bin[l];
    scale[l] = static_cast<A>(2 * coefficient * g.square[b] / g.area[b]);
  }
  for (std::int64_t p = 0; p < planes; ++p, means += g.bins, offsets += kLevel * kLevel) {
    for (int i = 0; i < kLevel; ++i) {
      for (int j = 0; j < kLevel; ++j) {
        A offset = scale[0] * means[kLevel * i + j];
        if (kLevel == 4) offset += scale[1] * means[16 + i / 2 * 2 + j / 2] + scale[2] * means[20];
        if (kLevel == 2) offset += scale[1] * means[4];
        offsets[kLevel * i + j] = offset;
      }
    }
  }
}

template <int kWidth, typename T>
DISTPRO_INLINE void backward_band(const T* s, const T* t, T* __restrict gradient, std::int64_t rows,
                                  std::int64_t width, Accumulation<T> scale,
                                  const Accumulation<T>* __restrict offsets) {
  using A = Accumulation<T>;
  if constexpr (kWidth == 0) {
    for (std::int64_t y = 0; y < rows; ++y, s += width, t += width, gradient += width) {
      gradient_run(s, t, gradient, width, scale, offsets);
    }
  } else {
    using V = Vector<T>;
    constexpr int kLanes = sizeof(V) / sizeof(A), kVectors = kWidth / kLanes;
    V offset[kVectors];
    for (int v = 0; v < kVectors; ++v) offset[v] = load_vector(offsets + v * kLanes);
    for (std::int64_t y = 0; y < rows; ++y, s += kWidth, t += kWidth, gradient += kWidth) {
      for (int v = 0; v < kVectors; ++v) {
        const V d = load_vector(s + v * kLanes) - load_vector(t + v * kLanes);
        store_vector(gradient + v * kLanes, scale * d + offset[v]);
      }
    }
  }
}

template <int kWidth, typename T>
void backward_nested(const Geometry& g, const T* s, const T* t, T* gradient, std::int64_t planes,
                     const Accumulation<T>* means, double coefficient, Accumulation<T>* scratch) {
  using A = Accumulation<T>;
  const std::int64_t bands = g.level[0], rows = g.h / bands, batch = batch_of(g);
  const A scale = static_cast<A>(2 * coefficient * g.full);
  A* fine = scratch;
  A* spare = fine + batch * bands * g.w;
  for (std::int64_t first = 0; first < planes; first += batch) {
    const std::int64_t count = planes - first < batch ? planes - first : batch;
    const A* kept = means + first * g.bins;
    if (bands == 4) nested_offsets<4>(g, kept, count, coefficient, fine);
    if (bands == 2) nested_offsets<2>(g, kept, count, coefficient, fine);
    if (bands == 1) nested_offsets<1>(g, kept, count, coefficient, fine);
    const A* offsets = spread_runs(fine, spare, count * bands * bands, g.w / bands);
    for (std::int64_t b = 0; b < count * bands; ++b) {
      backward_band<kWidth>(s, t, gradient, rows, g.w, scale, offsets + b * g.w);
      s += rows * g.w;
      t += rows * g.w;
      gradient += rows * g.w;
    }
  }
}
