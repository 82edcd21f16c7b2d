// One tile of the pathway loss. Included inside a namespace once per instruction set, after
// storage.h: no includes, and nothing that the linker could merge across instruction sets. Many
// short sums run side by side and end in a double: they vectorise, and no float adds up more than a
// plane.

constexpr int kLanes = 32;  // independent sums of a flat loop; enough to fill any vector unit

// sum of (s - t)^2, or of |s - t|
template <bool kAbsolute, typename T>
double forward_flat(const T* s, const T* t, std::int64_t size) {
  using A = Accumulation<T>;
  double total = 0;
  for (std::int64_t start = 0; start < size; start += 1024 * kLanes) {
    const std::int64_t end = start + 1024 * kLanes < size ? start + 1024 * kLanes : size;
    A sums[kLanes] = {};
    std::int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) {
      for (int k = 0; k < kLanes; ++k) {
        const A d = load(s[i + k]) - load(t[i + k]);
        sums[k] += kAbsolute ? (d < 0 ? -d : d) : d * d;
      }
    }
    for (; i < end; ++i) {
      const A d = load(s[i]) - load(t[i]);
      sums[0] += kAbsolute ? (d < 0 ? -d : d) : d * d;
    }
    for (int k = 0; k < kLanes; ++k) total += sums[k];
  }
  return total;
}

// gradient = scale * (s - t), or scale * sign(s - t), which keeps a NaN
template <bool kAbsolute, typename T>
void backward_flat(const T* s, const T* t, T* gradient, std::int64_t size, Accumulation<T> scale) {
  using A = Accumulation<T>;
  for (std::int64_t i = 0; i < size; ++i) {
    const A d = load(s[i]) - load(t[i]);
    if (kAbsolute) {
      store(gradient[i], d > 0 ? scale : d < 0 ? -scale : d * scale);
    } else {
      store(gradient[i], scale * d);
    }
  }
}

// Adds a segment's sum to the bins that hold it, `lanes` planes side by side.
template <typename A>
void add_to_bins(const Geometry& g, int row, int column, const A* sum, A* bins, std::int64_t stride,
                 std::int64_t lanes) {
  for (int l = 0; l < g.levels; ++l) {
    for (int i = g.rows.first[l][row]; i < g.rows.end[l][row]; ++i) {
      for (int j = g.columns.first[l][column]; j < g.columns.end[l][column]; ++j) {
        A* bin = bins + (g.first_bin[l] + i * g.level[l] + j) * stride;
        for (std::int64_t k = 0; k < lanes; ++k) bin[k] += sum[k];
      }
    }
  }
}

// Turns sums into means, in place, and returns what their squares give to the loss.
template <typename A>
double finish_bins(const Geometry& g, A* bins, std::int64_t stride, std::int64_t lanes) {
  double loss = 0;
  for (int b = 0; b < g.bins; ++b) {
    const A inverse = static_cast<A>(1 / g.area[b]);
    A squares = 0;
    for (std::int64_t k = 0; k < lanes; ++k) {
      A& mean = bins[b * stride + k];
      mean *= inverse;
      squares += mean * mean;
    }
    loss += g.square[b] * squares;
  }
  return loss;
}

constexpr int kSide = 16;  // planes that the kernel for any bins takes side by side

// Up to kSide planes [H, W] with bins of any kind, turned row by row so that they lie side by side:
// short rows and odd bins then cost no more than long ones. `means`: [planes, bins], or null.
template <typename T>
double forward_planes(const Geometry& g, const T* s, const T* t, std::int64_t planes,
                      Accumulation<T>* means, Accumulation<T>* scratch) {
  using A = Accumulation<T>;
  A bins[kMaxBins * kSide] = {}, squares[kSide] = {};
  A* turned = scratch;  // [W, kSide]
  for (std::int64_t x = 0; x < g.w * kSide; ++x) turned[x] = 0;
  for (int i = 0; i < g.rows.segments; ++i) {
    A sums[kMaxSegments * kSide] = {}, row_squares[kSide] = {};
    for (std::int64_t y = g.rows.edge[i]; y < g.rows.edge[i + 1]; ++y) {
      for (std::int64_t p = 0; p < planes; ++p) {
        const std::int64_t row = (p * g.h + y) * g.w;
        for (std::int64_t x = 0; x < g.w; ++x) {
          turned[x * kSide + p] = load(s[row + x]) - load(t[row + x]);
        }
      }
      for (int j = 0; j < g.columns.segments; ++j) {
        A* sum = sums + j * kSide;
        for (std::int64_t x = g.columns.edge[j]; x < g.columns.edge[j + 1]; ++x) {
          for (int k = 0; k < kSide; ++k) {
            const A d = turned[x * kSide + k];
            sum[k] += d;
            row_squares[k] += d * d;
          }
        }
      }
    }
    for (int j = 0; j < g.columns.segments; ++j) {
      add_to_bins(g, i, j, sums + j * kSide, bins, kSide, kSide);
    }
    for (int k = 0; k < kSide; ++k) squares[k] += row_squares[k];
  }
  double square = 0;
  for (int k = 0; k < kSide; ++k) square += squares[k];
  const double loss = g.full * square + finish_bins(g, bins, kSide, kSide);
  if (!means) return loss;
  for (std::int64_t p = 0; p < planes; ++p) {
    for (int b = 0; b < g.bins; ++b) means[p * g.bins + b] = bins[b * kSide + p];
  }
  return loss;
}

// `lanes` channels of one picture [H, W, C]; `sums` is scratch of 3 * lanes, `bins` [bins, stride].
template <typename T>
double forward_channels(const Geometry& g, const T* s, const T* t, std::int64_t lanes,
                        Accumulation<T>* bins, std::int64_t stride, Accumulation<T>* sums) {
  using A = Accumulation<T>;
  A* squares = sums + lanes;  // of a segment
  A* totals = squares + lanes;
  for (std::int64_t k = 0; k < lanes; ++k) totals[k] = 0;
  for (int b = 0; b < g.bins; ++b) {
    for (std::int64_t k = 0; k < lanes; ++k) bins[b * stride + k] = 0;
  }
  for (int i = 0; i < g.rows.segments; ++i) {
    for (int j = 0; j < g.columns.segments; ++j) {
      for (std::int64_t k = 0; k < 2 * lanes; ++k) sums[k] = 0;
      for (std::int64_t y = g.rows.edge[i]; y < g.rows.edge[i + 1]; ++y) {
        for (std::int64_t x = g.columns.edge[j]; x < g.columns.edge[j + 1]; ++x) {
          const std::int64_t pixel = (y * g.w + x) * g.c;
          accumulate_run(s + pixel, t + pixel, lanes, sums, squares);
        }
      }
      add_to_bins(g, i, j, sums, bins, stride, lanes);
      for (std::int64_t k = 0; k < lanes; ++k) totals[k] += squares[k];
    }
  }
  double square = 0;
  for (std::int64_t k = 0; k < lanes; ++k) square += totals[k];
  return g.full * square + finish_bins(g, bins, stride, lanes);
}

// What the bins of a segment add to the gradient: coefficient * sum of 2 square / area * mean.
template <typename A>
void offset_of(const Geometry& g, int row, int column, const A* bins, std::int64_t stride,
               double coefficient, A* offset, std::int64_t lanes) {
  for (std::int64_t k = 0; k < lanes; ++k) offset[k] = 0;
  for (int l = 0; l < g.levels; ++l) {
    for (int i = g.rows.first[l][row]; i < g.rows.end[l][row]; ++i) {
      for (int j = g.columns.first[l][column]; j < g.columns.end[l][column]; ++j) {
        const int b = g.first_bin[l] + i * g.level[l] + j;
        const A scale = static_cast<A>(2 * coefficient * g.square[b] / g.area[b]);
        for (std::int64_t k = 0; k < lanes; ++k) offset[k] += scale * bins[b * stride + k];
      }
    }
  }
}

template <typename T>
void backward_planes(const Geometry& g, const T* s, const T* t, T* gradient, std::int64_t planes,
                     const Accumulation<T>* means, double coefficient, Accumulation<T>* offsets) {
  using A = Accumulation<T>;
  const A scale = static_cast<A>(2 * coefficient * g.full);
  A bins[kMaxBins * kSide] = {};
  for (std::int64_t p = 0; p < planes; ++p) {
    for (int b = 0; b < g.bins; ++b) bins[b * kSide + p] = means[p * g.bins + b];
  }
  for (int i = 0; i < g.rows.segments; ++i) {
    A offset[kMaxSegments * kSide];
    for (int j = 0; j < g.columns.segments; ++j) {
      offset_of(g, i, j, bins, kSide, coefficient, offset + j * kSide, kSide);
    }
    for (std::int64_t p = 0; p < planes; ++p) {
      for (int j = 0; j < g.columns.segments; ++j) {
        const A value = offset[j * kSide + p];
        for (std::int64_t x = g.columns.edge[j]; x < g.columns.edge[j + 1]; ++x) offsets[x] = value;
      }
      for (std::int64_t y = g.rows.edge[i]; y < g.rows.edge[i + 1]; ++y) {
        const std::int64_t row = (p * g.h + y) * g.w;
        gradient_run(s + row, t + row, gradient + row, g.w, scale, offsets);
      }
    }
  }
}

template <typename T>
void backward_channels(const Geometry& g, const T* s, const T* t, T* gradient, std::int64_t lanes,
                       const Accumulation<T>* bins, double coefficient, Accumulation<T>* offsets) {
  using A = Accumulation<T>;
  const A scale = static_cast<A>(2 * coefficient * g.full);
  for (int i = 0; i < g.rows.segments; ++i) {
    for (int j = 0; j < g.columns.segments; ++j) {
      offset_of(g, i, j, bins, g.c, coefficient, offsets, lanes);
      for (std::int64_t y = g.rows.edge[i]; y < g.rows.edge[i + 1]; ++y) {
        for (std::int64_t x = g.columns.edge[j]; x < g.columns.edge[j + 1]; ++x) {
          const std::int64_t pixel = (y * g.w + x) * g.c;
          gradient_run(s + pixel, t + pixel, gradient + pixel, lanes, scale, offsets);
        }
      }
    }
  }
}

// The part of the pathway's loss that `planes` planes from `first` give. `means`: the pathway's
// own, or null; `scratch`: see scratch_of.
template <typename T>
double forward_tile(const Geometry& g, std::int64_t first, std::int64_t planes, const void* student,
                    const void* teacher, void* means, void* scratch) {
  using A = Accumulation<T>;
  const std::int64_t pixels = g.h * g.w;
  const T* s = static_cast<const T*>(student);
  const T* t = static_cast<const T*>(teacher);
  A* kept = static_cast<A*>(means);
  A* sums = static_cast<A*>(scratch);
  if (g.layout == Layout::channels_last) {
    const std::int64_t picture = first / g.c, channel = first % g.c;
    const std::int64_t start = picture * g.c * pixels + channel;
    A* bins = kept ? kept + picture * g.c * g.bins + channel : sums + 3 * planes;
    return forward_channels(g, s + start, t + start, planes, bins, kept ? g.c : planes, sums);
  }
  s += first * pixels;
  t += first * pixels;
  if (g.distance == Distance::l1) return g.full * forward_flat<true>(s, t, planes * pixels);
  if (g.levels == 0) return g.full * forward_flat<false>(s, t, planes * pixels);
  if (g.nested) {
    const auto run = g.w == 8    ? forward_nested<8, T>
                     : g.w == 16 ? forward_nested<16, T>
                     : g.w == 32 ? forward_nested<32, T>
                                 : forward_nested<0, T>;
    return run(g, s, t, planes, kept ? kept + first * g.bins : nullptr, sums);
  }
  double loss = 0;
  for (std::int64_t p = 0; p < planes; p += kSide) {
    const std::int64_t count = planes - p < kSide ? planes - p : kSide;
    A* bins = kept ? kept + (first + p) * g.bins : nullptr;
    loss += forward_planes(g, s + p * pixels, t + p * pixels, count, bins, sums);
  }
  return loss;
}

// gradient = coefficient * d loss / d student over the tile.
template <typename T>
void backward_tile(const Geometry& g, std::int64_t first, std::int64_t planes, const void* student,
                   const void* teacher, void* gradient, const void* means, double coefficient,
                   void* scratch) {
  using A = Accumulation<T>;
  const std::int64_t pixels = g.h * g.w;
  const A* kept = static_cast<const A*>(means);
  A* offsets = static_cast<A*>(scratch);
  const bool last = g.layout == Layout::channels_last;
  const std::int64_t picture = first / g.c, channel = first % g.c;
  const std::int64_t start = last ? picture * g.c * pixels + channel : first * pixels;
  const T* s = static_cast<const T*>(student) + start;
  const T* t = static_cast<const T*>(teacher) + start;
  T* out = static_cast<T*>(gradient) + start;
  if (coefficient == 0) {  // the maps may hold anything
    for (std::int64_t y = 0; y < (last ? pixels : planes); ++y) {
      const std::int64_t run = last ? planes : pixels, step = last ? g.c : pixels;
      for (std::int64_t k = 0; k < run; ++k) store(out[y * step + k], A{0});
    }
  } else if (last) {
    const A* bins = kept + picture * g.c * g.bins + channel;
    backward_channels(g, s, t, out, planes, bins, coefficient, offsets);
  } else if (g.distance == Distance::l1) {
    backward_flat<true>(s, t, out, planes * pixels, static_cast<A>(coefficient * g.full));
  } else if (g.levels == 0) {
    backward_flat<false>(s, t, out, planes * pixels, static_cast<A>(2 * coefficient * g.full));
  } else if (g.nested) {
    const auto run = g.w == 8    ? backward_nested<8, T>
                     : g.w == 16 ? backward_nested<16, T>
                     : g.w == 32 ? backward_nested<32, T>
                                 : backward_nested<0, T>;
    run(g, s, t, out, planes, kept + first * g.bins, coefficient, offsets);
  } else {
    for (std::int64_t p = 0; p < planes; p += kSide) {
      const std::int64_t count = planes - p < kSide ? planes - p : kSide, plane = p * pixels;
      const A* bins = kept + (first + p) * g.bins;
      backward_planes(g, s + plane, t + plane, out + plane, count, bins, coefficient, offsets);
    }
  }
}
