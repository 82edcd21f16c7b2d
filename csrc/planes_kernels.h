// Planes [H, W] with the bins of an HCL, overlapping or not. Included after flat_kernels.h, inside
// a namespace once per instruction set, hence no includes.
//
// Short rows do not fill vectors. So a batch of planes is one flat run wherever the maps are read
// or written: forward stores the differences, backward expands its offsets beforehand. In between,
// a row of bins is one vector, with the bin columns of all levels side by side, and membership in a
// bin is a factor of 1 or 0: no branches, and overlaps cost nothing.

constexpr int kColumns = 8;
template <typename A>
struct Columns {
  typedef A vector __attribute__((vector_size(kColumns * sizeof(A)), may_alias));
};

// The rows of bins of the levels 4, 2 and 1: index of the level, number of bins, position of the
// first bin among the 21 of a plane and in a vector. The vector around a row is within the 21.
struct Row {
  int level, bins, first, column;
};
constexpr int kRows = 7;
constexpr Row kRow[kRows] = {{0, 4, 0, 0},  {0, 4, 4, 0},  {0, 4, 8, 0}, {0, 4, 12, 0},
                             {1, 2, 16, 5}, {1, 2, 18, 5}, {2, 1, 20, 7}};

// The rows of the last kLevels levels.
template <int kLevels>
struct Rows {
  static constexpr int size = (1 << kLevels) - 1;
  static constexpr int bins(int r) { return kRow[kRows - size + r].bins; }
  static constexpr int column(int r) { return kRow[kRows - size + r].column; }
  static constexpr int level(int r) {
    return kRow[kRows - size + r].level - kRow[kRows - size].level;
  }
  static constexpr int first(int r) {
    return kRow[kRows - size + r].first - kRow[kRows - size].first;
  }
  // Lane of the c-th column of bins, counted over all levels.
  static constexpr int lane(int c) { return c + kColumns - size - (kLevels == 3 && c < 4 ? 1 : 0); }
  // The first row of a level.
  static constexpr int row(int l) { return size + 1 - (2 << (kLevels - 1 - l)); }
};

constexpr std::int64_t kBatch = 2048;  // elements of a batch, at least one plane: 8 KB, in L1
constexpr int kMostLanes = 16;  // of any vector: a row's last one may extend that far beyond it
constexpr int kSide = 4;        // segments of rows that are summed together
constexpr int kLines = (kMaxSegments + kSide - 1) / kSide * kSide;

DISTPRO_INLINE std::int64_t batch_of(const Geometry& g) {
  const std::int64_t planes = kBatch / (g.h * g.w);
  return planes < 1 ? 1 : planes;
}

// The width rounded up to whole vectors, so that all parts of the scratch start on one.
inline std::int64_t padded_width(const Geometry& g) {
  return (g.w + kMostLanes - 1) / kMostLanes * kMostLanes;
}

// Scratch elements of forward_planes and backward_planes.
inline std::int64_t scratch_of(const Geometry& g) {
  return (kColumns + kLines) * padded_width(g) + batch_of(g) * g.h * g.w + kMostLanes;
}

// 1 where a pixel's column lies in a column of bins, else 0: at [x * step_x + column * step].
template <int kLevels, typename A>
void mark_columns(const Geometry& g, A* inside, std::int64_t step_x, std::int64_t step) {
  using R = Rows<kLevels>;
  const std::int64_t size = kColumns * padded_width(g);
  for (std::int64_t k = 0; k < size; ++k) inside[k] = 0;
  for (int l = 0; l < kLevels; ++l) {
    for (int j = 0; j < g.columns.segments; ++j) {
      for (std::int64_t x = g.columns.edge[j]; x < g.columns.edge[j + 1]; ++x) {
        for (int c = g.columns.first[l][j]; c < g.columns.end[l][j]; ++c) {
          inside[x * step_x + (R::column(R::row(l)) + c) * step] = 1;
        }
      }
    }
  }
}

// 1 where a segment of rows lies in a row of bins, else 0.
template <int kLevels, typename A>
void mark_rows(const Geometry& g, A (*inside)[kColumns]) {
  for (int l = 0; l < kLevels; ++l) {
    for (int i = 0; i < g.rows.segments; ++i) {
      for (int r = g.rows.first[l][i]; r < g.rows.end[l][i]; ++r) {
        inside[i][Rows<kLevels>::row(l) + r] = 1;
      }
    }
  }
}

// times * factors[b] for each bin b, one row of bins at a time.
template <int kLevels, typename C>
void place_factors(const double* factors, double times, C* placed) {
  using R = Rows<kLevels>;
  for (int r = 0; r < R::size; ++r) {
    for (int c = 0; c < R::bins(r); ++c) {
      placed[r][R::column(r) + c] = times * factors[R::first(r) + c];
    }
  }
}

// `means`: [planes, bins], or null.
template <int kLevels, typename T>
double forward_planes(const Geometry& g, const T* s, const T* t, std::int64_t planes,
                      Accumulation<T>* means, Accumulation<T>* scratch) {
  using A = Accumulation<T>;
  using C = typename Columns<A>::vector;
  using R = Rows<kLevels>;
  const std::int64_t pixels = g.h * g.w, batch = batch_of(g), width = padded_width(g);
  const C* columns = reinterpret_cast<const C*>(scratch);  // [W]
  A* lines = scratch + kColumns * width;                   // [kLines, width]: sums of segments
  A* differences = lines + kLines * width;
  mark_columns<kLevels>(g, scratch, kColumns, 1);
  A in_rows[kLines][kColumns] = {};
  mark_rows<kLevels>(g, in_rows);
  C inverse[R::size] = {};
  place_factors<kLevels>(g.inverse, 1, inverse);
  for (std::int64_t k = g.rows.segments * width; k < kLines * width; ++k) lines[k] = 0;

  double loss = 0;
  for (std::int64_t first = 0; first < planes; first += batch) {
    const std::int64_t count = planes - first < batch ? planes - first : batch;
    const std::int64_t start = first * pixels;
    loss += g.full * forward_flat<Flat::pooled>(s + start, t + start, count * pixels, differences);
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
          store_vector(lines + i * width + x, sum);
        }
      }
      C rows[R::size] = {};  // of bins
      for (int i = 0; i < g.rows.segments; i += kSide) {
        C sums[kSide] = {};
        const A* line = lines + i * width;
        for (std::int64_t x = 0; x < g.w; ++x) {
          for (int k = 0; k < kSide; ++k) sums[k] += line[k * width + x] * columns[x];
        }
        for (int k = 0; k < kSide; ++k) {
          for (int r = 0; r < R::size; ++r) rows[r] += in_rows[i + k][r] * sums[k];
        }
      }
      A* to = means ? means + (first + p) * g.bins : nullptr;
#pragma GCC unroll 8
      for (int r = 0; r < R::size; ++r) {
        const C mean = rows[r] * inverse[r];
        squares[R::level(r)] += mean * mean;
        if (!to) continue;
        A found[kColumns];
        __builtin_memcpy(found, &mean, sizeof(mean));
        __builtin_memcpy(to + R::first(r), found + R::column(r), R::bins(r) * sizeof(A));
      }
    }
    for (int l = 0; l < kLevels; ++l) {
      double sum = 0;
      for (int c = 0; c < g.level[l]; ++c) sum += squares[l][R::column(R::row(l)) + c];
      loss += g.square[l] * sum;
    }
  }
  return loss;
}

template <int kLevels, typename T>
void backward_planes(const Geometry& g, const T* s, const T* t, T* gradient, std::int64_t planes,
                     const Accumulation<T>* means, double coefficient, Accumulation<T>* scratch) {
  using A = Accumulation<T>;
  using C = typename Columns<A>::vector;
  using R = Rows<kLevels>;
  const std::int64_t pixels = g.h * g.w, batch = batch_of(g), width = padded_width(g);
  A* columns = scratch;  // [kColumns, width]
  A* offsets = columns + kColumns * width;
  mark_columns<kLevels>(g, columns, 1, width);
  A in_rows[kLines][kColumns] = {};
  mark_rows<kLevels>(g, in_rows);
  C factors[R::size] = {};
  place_factors<kLevels>(g.gain, coefficient, factors);
  const A scale = static_cast<A>(2 * coefficient * g.full);

  for (std::int64_t first = 0; first < planes; first += batch) {
    const std::int64_t count = planes - first < batch ? planes - first : batch;
    for (std::int64_t p = 0; p < count; ++p) {
      const A* mean = means + (first + p) * g.bins;
      C rows[R::size];  // of bins: what each adds to the gradient in its columns
#pragma GCC unroll 8
      for (int r = 0; r < R::size; ++r) {
        A found[kColumns] = {};
        if constexpr (kLevels == 3) {
          __builtin_memcpy(found, mean + R::first(r) - R::column(r), sizeof(found));
        } else {
          __builtin_memcpy(found + R::column(r), mean + R::first(r), R::bins(r) * sizeof(A));
        }
        __builtin_memcpy(rows + r, found, sizeof(found));
        rows[r] *= factors[r];
      }
      A* to = offsets + p * pixels;
      for (int i = 0; i < g.rows.segments; ++i) {
        C sum = {};
        for (int r = 0; r < R::size; ++r) sum += in_rows[i][r] * rows[r];
        A factor[kColumns];
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
