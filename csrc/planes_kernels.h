// Planes [H, W] with the bins of an HCL, overlapping or not. Included after flat_kernels.h, inside
// a namespace once per instruction set, hence no includes.
//
// Short rows do not fill vectors. So a batch of planes is one flat run wherever the maps are read
// or written: forward stores the differences, backward expands its offsets beforehand. In between,
// a row of bins is one vector, with the bin columns of all levels side by side, and membership in a
// bin is a factor of 1 or 0: no branches, and overlaps cost nothing.

constexpr int kBinColumns = 8;
template <typename A>
struct BinRowVector {
  typedef A type __attribute__((vector_size(kBinColumns * sizeof(A)), may_alias));
};

// The rows of bins of the levels 4, 2 and 1: index of the level, number of bins, position of the
// first bin among the 21 of a plane and in a vector. A vector that is loaded so that a row's bins
// come into their lanes stays within the 21.
struct BinRow {
  int level, bins, first_bin, first_lane;
};
constexpr int kBinRows = 7;
constexpr BinRow kBinRow[kBinRows] = {{0, 4, 0, 0},  {0, 4, 4, 0},  {0, 4, 8, 0}, {0, 4, 12, 0},
                                      {1, 2, 16, 5}, {1, 2, 18, 5}, {2, 1, 20, 7}};

// The rows of the last kLevels levels.
template <int kLevels>
struct BinRows {
  static constexpr int size = (1 << kLevels) - 1;
  static constexpr int bins(int r) { return kBinRow[kBinRows - size + r].bins; }
  static constexpr int first_lane(int r) { return kBinRow[kBinRows - size + r].first_lane; }
  static constexpr int level(int r) {
    return kBinRow[kBinRows - size + r].level - kBinRow[kBinRows - size].level;
  }
  static constexpr int first_bin(int r) {
    return kBinRow[kBinRows - size + r].first_bin - kBinRow[kBinRows - size].first_bin;
  }
  // Lane of the c-th column of bins, counted over all levels.
  static constexpr int lane(int c) {
    return c + kBinColumns - size - (kLevels == 3 && c < 4 ? 1 : 0);
  }
  // The first row of a level.
  static constexpr int first_row(int l) { return size + 1 - (2 << (kLevels - 1 - l)); }
};

constexpr std::int64_t kBatchElements = 2048;  // 8 KB, in L1; a batch is at least one plane
constexpr int kMaxLanes = 16;  // of any vector: a row's last one may extend that far beyond it
constexpr int kSegmentsTogether = 4;  // segments of rows that are summed over the columns together
constexpr int kPaddedSegments =
    (kMaxSegments + kSegmentsTogether - 1) / kSegmentsTogether * kSegmentsTogether;

DISTPRO_INLINE std::int64_t planes_per_batch(const Geometry& g) {
  const std::int64_t planes = kBatchElements / (g.h * g.w);
  return planes < 1 ? 1 : planes;
}

// The width rounded up to whole vectors, so that all parts of the scratch start on one.
inline std::int64_t padded_width(const Geometry& g) {
  return (g.w + kMaxLanes - 1) / kMaxLanes * kMaxLanes;
}

// Scratch elements of forward_planes and backward_planes.
inline std::int64_t scratch_of(const Geometry& g) {
  return (kBinColumns + kPaddedSegments) * padded_width(g) + planes_per_batch(g) * g.h * g.w +
         kMaxLanes;
}

// 1 where a pixel's column lies in a column of bins, else 0: at [x * step_x + column * step].
template <int kLevels, typename A>
void mark_columns(const Geometry& g, A* inside, std::int64_t step_x, std::int64_t step) {
  using R = BinRows<kLevels>;
  const std::int64_t size = kBinColumns * padded_width(g);
  for (std::int64_t k = 0; k < size; ++k) inside[k] = 0;
  for (int l = 0; l < kLevels; ++l) {
    for (int j = 0; j < g.columns.segments; ++j) {
      for (std::int64_t x = g.columns.edge[j]; x < g.columns.edge[j + 1]; ++x) {
        for (int c = g.columns.first[l][j]; c < g.columns.end[l][j]; ++c) {
          inside[x * step_x + (R::first_lane(R::first_row(l)) + c) * step] = 1;
        }
      }
    }
  }
}

// 1 where a segment of rows lies in a row of bins, else 0.
template <int kLevels, typename A>
void mark_rows(const Geometry& g, A (*inside)[kBinColumns]) {
  for (int l = 0; l < kLevels; ++l) {
    for (int i = 0; i < g.rows.segments; ++i) {
      for (int r = g.rows.first[l][i]; r < g.rows.end[l][i]; ++r) {
        inside[i][BinRows<kLevels>::first_row(l) + r] = 1;
      }
    }
  }
}

// times * factors[b] for each bin b, one row of bins at a time.
template <int kLevels, typename C>
void place_factors(const double* factors, double times, C* placed) {
  using R = BinRows<kLevels>;
  for (int r = 0; r < R::size; ++r) {
    for (int c = 0; c < R::bins(r); ++c) {
      placed[r][R::first_lane(r) + c] = times * factors[R::first_bin(r) + c];
    }
  }
}

// `means`: [planes, bins], or null.
template <int kLevels, typename T>
double forward_planes(const Geometry& g, const T* s, const T* t, std::int64_t planes,
                      Accumulation<T>* means, Accumulation<T>* scratch) {
  using A = Accumulation<T>;
  using C = typename BinRowVector<A>::type;
  using R = BinRows<kLevels>;
  const std::int64_t pixels = g.h * g.w, batch = planes_per_batch(g), width = padded_width(g);
  const C* columns = reinterpret_cast<const C*>(scratch);  // [W]
  A* segment_sums = scratch + kBinColumns * width;  // [kPaddedSegments, width]: sums of segments
  A* differences = segment_sums + kPaddedSegments * width;
  mark_columns<kLevels>(g, scratch, kBinColumns, 1);
  A in_rows[kPaddedSegments][kBinColumns] = {};
  mark_rows<kLevels>(g, in_rows);
  C inverse[R::size] = {};
  place_factors<kLevels>(g.inverse_area, 1, inverse);
  for (std::int64_t k = g.rows.segments * width; k < kPaddedSegments * width; ++k) {
    segment_sums[k] = 0;
  }

  double loss = 0;
  for (std::int64_t first = 0; first < planes; first += batch) {
    const std::int64_t count = planes - first < batch ? planes - first : batch;
    const std::int64_t start = first * pixels;
    loss += g.element_weight *
            forward_flat<Flat::pooled>(s + start, t + start, count * pixels, differences);
    C squares[kLevels] = {};
    for (std::int64_t p = 0; p < count; ++p) {
      const A* plane = differences + p * pixels;
      prefetch(s + start + (count + p) * pixels, pixels);
      prefetch(t + start + (count + p) * pixels, pixels);
      for (int i = 0; i < g.rows.segments; ++i) {
        for (std::int64_t x = 0; x < g.w; x += kLanes<T>) {
          Vector<T> sum = load_vector(plane + g.rows.edge[i] * g.w + x);
          for (std::int64_t y = g.rows.edge[i] + 1; y < g.rows.edge[i + 1]; ++y) {
            sum += load_vector(plane + y * g.w + x);
          }
          store_vector(segment_sums + i * width + x, sum);
        }
      }
      C rows[R::size] = {};  // of bins
      for (int i = 0; i < g.rows.segments; i += kSegmentsTogether) {
        C sums[kSegmentsTogether] = {};
        const A* sums_of_rows = segment_sums + i * width;
        for (std::int64_t x = 0; x < g.w; ++x) {
          for (int k = 0; k < kSegmentsTogether; ++k) {
            sums[k] += sums_of_rows[k * width + x] * columns[x];
          }
        }
        for (int k = 0; k < kSegmentsTogether; ++k) {
          for (int r = 0; r < R::size; ++r) rows[r] += in_rows[i + k][r] * sums[k];
        }
      }
      A* to = means ? means + (first + p) * g.bins : nullptr;
#pragma GCC unroll 8
      for (int r = 0; r < R::size; ++r) {
        const C mean = rows[r] * inverse[r];
        squares[R::level(r)] += mean * mean;
        if (!to) continue;
        A lanes[kBinColumns];
        __builtin_memcpy(lanes, &mean, sizeof(mean));
        __builtin_memcpy(to + R::first_bin(r), lanes + R::first_lane(r), R::bins(r) * sizeof(A));
      }
    }
    for (int l = 0; l < kLevels; ++l) {
      double sum = 0;
      for (int c = 0; c < g.level[l]; ++c) sum += squares[l][R::first_lane(R::first_row(l)) + c];
      loss += g.bin_weight[l] * sum;
    }
  }
  return loss;
}

template <int kLevels, typename T>
void backward_planes(const Geometry& g, const T* s, const T* t, T* gradient, std::int64_t planes,
                     const Accumulation<T>* means, double coefficient, Accumulation<T>* scratch) {
  using A = Accumulation<T>;
  using C = typename BinRowVector<A>::type;
  using R = BinRows<kLevels>;
  const std::int64_t pixels = g.h * g.w, batch = planes_per_batch(g), width = padded_width(g);
  A* columns = scratch;  // [kBinColumns, width]
  A* offsets = columns + kBinColumns * width;
  mark_columns<kLevels>(g, columns, 1, width);
  A in_rows[kPaddedSegments][kBinColumns] = {};
  mark_rows<kLevels>(g, in_rows);
  C factors[R::size] = {};
  place_factors<kLevels>(g.gradient_factor, coefficient, factors);
  const A scale = static_cast<A>(2 * coefficient * g.element_weight);

  for (std::int64_t first = 0; first < planes; first += batch) {
    const std::int64_t count = planes - first < batch ? planes - first : batch;
    for (std::int64_t p = 0; p < count; ++p) {
      const A* mean = means + (first + p) * g.bins;
      C rows[R::size];  // of bins: what each adds to the gradient in its columns
#pragma GCC unroll 8
      for (int r = 0; r < R::size; ++r) {
        A lanes[kBinColumns] = {};
        if constexpr (kLevels == 3) {
          __builtin_memcpy(lanes, mean + R::first_bin(r) - R::first_lane(r), sizeof(lanes));
        } else {
          __builtin_memcpy(lanes + R::first_lane(r), mean + R::first_bin(r),
                           R::bins(r) * sizeof(A));
        }
        __builtin_memcpy(rows + r, lanes, sizeof(lanes));
        rows[r] *= factors[r];
      }
      A* to = offsets + p * pixels;
      for (int i = 0; i < g.rows.segments; ++i) {
        C sum = {};
        for (int r = 0; r < R::size; ++r) sum += in_rows[i][r] * rows[r];
        A factor[kBinColumns];
        __builtin_memcpy(factor, &sum, sizeof(sum));
        for (std::int64_t x = 0; x < g.w; x += kLanes<T>) {
          // A row's last vector ends with the row; if it is the only one, it extends into the next
          // row, which is then overwritten with its own.
          const std::int64_t at = x == 0 || x + kLanes<T> <= g.w ? x : g.w - kLanes<T>;
          Vector<T> offset = {};
          for (int c = 0; c < R::size; ++c) {
            offset += factor[R::lane(c)] * load_vector(columns + R::lane(c) * width + at);
          }
          for (std::int64_t y = g.rows.edge[i]; y < g.rows.edge[i + 1]; ++y) {
            store_vector(to + y * g.w + at, offset);
          }
        }
      }
    }
    const std::int64_t start = first * pixels;
    backward_flat<Flat::pooled>(s + start, t + start, gradient + start, count * pixels, scale,
                                offsets);
  }
}
