// One tile of the forward pass: its squared differences, and the means of its bins.
#pragma once

#include "maps.cuh"

namespace distpro::cuda {

// The weight of a squared bin mean / `scale`; selected, as indexing would use local memory.
template <typename Real>
__device__ inline Real ratio_of(const Map& map, int level) {
  return static_cast<Real>(level == 4 ? map.ratio[0] : level == 2 ? map.ratio[1] : map.ratio[2]);
}

template <typename T>
__device__ Acc<T> flat_tile(const Map& map, int tile, bool l1) {
  const T* const maps[2] = {static_cast<const T*>(map.student), static_cast<const T*>(map.teacher)};
  const Run run = planes_at(map, tile, 0, map.tile_planes).run;
  const bool wide =
      aligned(maps[0] + run.origin, maps[1] + run.origin) && fits_width(run, kWidth<T>);
  Acc<T> sum = 0;
  walk_all(maps, run, wide, [&](auto lanes, int, int, std::int64_t, auto& x) {
#pragma unroll
    for (int j = 0; j < decltype(lanes)::value; ++j) {
      const Acc<T> d = x[0][j] - x[1][j];
      sum += l1 ? fabs(d) : d * d;
    }
  });
  return sum;
}

// The sums over each row bin of one column, in order of the bins: four quarters, two halves, all.
// Every row is read once; a row shared by two quarters is added to both.
template <typename Real>
__device__ inline void add_rows(const Real* cells, const Cells& at, int k, int column, int bins,
                                Real (&sums)[7]) {
  Real quarter[4], shared[5] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    quarter[i] = 0;
    const Range own{start_of_seventh(2 * i, at.height), start_of_seventh(2 * i + 1, at.height)};
    int cell = (k * at.height + own.start) * at.width + column;
    if (i > 0 && start_of_seventh(2 * i - 1, at.height) < own.start) {
      shared[i] = cells[at.element(cell - at.width)];
    }
    for (int row = own.start; row < own.end; ++row, cell += at.width) {
      quarter[i] += cells[at.element(cell)];
    }
  }
  const Real upper = quarter[0] + shared[1] + quarter[1];
  const Real lower = quarter[2] + shared[3] + quarter[3];
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] = shared[i] + quarter[i] + shared[i + 1];
  sums[4] = upper + shared[2];
  sums[5] = shared[2] + lower;
  sums[6] = upper + shared[2] + lower;
}

template <typename T>
__device__ Acc<T> staged_tile(const Map& map, int tile, Acc<T>* means, Acc<T>* cells) {
  using Real = Acc<T>;
  const T* const maps[2] = {static_cast<const T*>(map.student), static_cast<const T*>(map.teacher)};
  const int width = map.width;
  const int bins = map.bins;
  const int rows = row_bins(bins);
  Real sum = 0;
  for (int skip = 0; skip < map.tile_planes; skip += map.chunk) {
    const Planes planes = planes_at(map, tile, skip, map.chunk);
    if (planes.count <= 0) break;
    const Cells at(planes.count, map.height, width);
    if (skip > 0) __syncthreads();  // the previous chunk is done
    const bool wide = aligned(maps[0] + planes.run.origin, maps[1] + planes.run.origin);
    walk_all(maps, planes.run, wide, [&](auto lanes, int, int column, std::int64_t, auto& x) {
      constexpr int V = decltype(lanes)::value;
      constexpr int kStore = V < kWidth<Real> ? V : kWidth<Real>;
      Real* to = cells + at.element(column);
#pragma unroll
      for (int j = 0; j < V; j += kStore) {
        Pack<Real, kStore> pack;
#pragma unroll
        for (int i = 0; i < kStore; ++i) {
          pack.at[i] = x[0][j + i] - x[1][j + i];
          sum += pack.at[i] * pack.at[i];
        }
        *reinterpret_cast<Pack<Real, kStore>*>(to + j) = pack;
      }
    });
    __syncthreads();
    // One thread reads a whole column, then overwrites it with its row bins.
    for (int i = threadIdx.x; i < planes.count * width; i += kThreads) {
      const int k = i / width;
      const int column = i - k * width;
      Real sums[7];
      add_rows(cells, at, k, column, bins, sums);
#pragma unroll
      for (int j = 0; j < 7; ++j) {
        const int bin = j - (7 - rows);  // maps of few rows have only the last ones
        if (bin >= 0) cells[at.row_bin(bin, k, column)] = sums[j];
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < planes.count * bins; i += kThreads) {
      const int k = i / bins;
      const Bin2d bin = bin_at(i - k * bins, bins);
      const Range x = bin_pixels(bin.column, width, bin.level);
      const Range y = bin_pixels(bin.row, map.height, bin.level);
      const int row = row_bin_at(bin.level, bin.row, bins);
      Real total = 0;
      for (int column = x.start; column < x.end; ++column) {
        total += cells[at.row_bin(row, k, column)];
      }
      const Real mean = total / static_cast<Real>((x.end - x.start) * (y.end - y.start));
      sum += ratio_of<Real>(map, bin.level) * mean * mean;
      if (means) means[planes.means_offset + i] = mean;
    }
  }
  return sum;
}

// Sums, V planes at a time, over each segment of rows and columns. Each sum is in `parts` parts, so
// that all threads have work: sums[part][segment][plane]. Returns the thread's sum of squares.
template <int V, typename T>
__device__ inline Acc<T> add_segments(const Map& map, const Planes& planes, int parts,
                                      Acc<T>* sums) {
  using Real = Acc<T>;
  const T* student = static_cast<const T*>(map.student) + planes.run.origin;
  const T* teacher = static_cast<const T*>(map.teacher) + planes.run.origin;
  const int columns = segments(map.width);
  const int rectangles = segments(map.height) * columns;
  const int lanes = planes.count / V;
  const std::int64_t stride = map.channels_last ? map.channels : 1;
  Real sum = 0;
  for (int i = threadIdx.x; i < lanes * parts * rectangles; i += kThreads) {
    const int lane = i % lanes * V;
    const int part = i / lanes % parts;
    const int rectangle = i / lanes / parts;
    const Range y = segment_pixels(rectangle / columns, map.height);
    const Range x = segment_pixels(rectangle % columns, map.width);
    const int width = x.end - x.start;
    const int pixels = (y.end - y.start) * width;
    Real total[V] = {};
#pragma unroll 4
    for (int p = part; p < pixels; p += parts) {
      const int row = p / width;
      const std::int64_t offset =
          ((y.start + row) * map.width + x.start + p - row * width) * stride + lane;
      Real s[V], t[V];
      widen<T, V>(load_once<V>(student + offset), s);
      widen<T, V>(load<V>(teacher + offset), t);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const Real d = s[j] - t[j];
        total[j] += d;
        sum += d * d;
      }
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      sums[(part * rectangles + rectangle) * planes.count + lane + j] = total[j];
    }
  }
  return sum;
}

template <typename T>
__device__ Acc<T> segments_tile(const Map& map, int tile, Acc<T>* means, Acc<T>* sums) {
  using Real = Acc<T>;
  const T* const maps[2] = {static_cast<const T*>(map.student), static_cast<const T*>(map.teacher)};
  const int columns = segments(map.width);
  const int rectangles = segments(map.height) * columns;
  const int bins = map.bins;
  Real sum = 0;
  for (int skip = 0; skip < map.tile_planes; skip += map.chunk) {
    const Planes planes = planes_at(map, tile, skip, map.chunk);
    if (planes.count <= 0) break;
    const int size = rectangles * planes.count;
    const bool wide = map.channels_last && fits_width(planes.run, kWidth<T>) &&
                      planes.count % kWidth<T> == 0 &&
                      aligned(maps[0] + planes.run.origin, maps[1] + planes.run.origin);
    const int items = wide ? size / kWidth<T> : size;
    const int parts = max(1, min(kThreads / items, kScratch<T> / size));
    if (skip > 0) __syncthreads();
    sum += wide ? add_segments<kWidth<T>, T>(map, planes, parts, sums)
                : add_segments<1, T>(map, planes, parts, sums);
    __syncthreads();
    if (parts > 1) {
      for (int i = threadIdx.x; i < size; i += kThreads) {
        for (int part = 1; part < parts; ++part) sums[i] += sums[part * size + i];
      }
      __syncthreads();
    }
    for (int i = threadIdx.x; i < bins * planes.count; i += kThreads) {
      const int b = i / planes.count;
      const int k = i - b * planes.count;
      const Bin2d bin = bin_at(b, bins);
      const Range rows = segments_of_bin(bin.row, map.height, bin.level);
      const Range run = segments_of_bin(bin.column, map.width, bin.level);
      Real total = 0;
      for (int row = rows.start; row < rows.end; ++row) {
        for (int column = run.start; column < run.end; ++column) {
          total += sums[(row * columns + column) * planes.count + k];
        }
      }
      const Range x = bin_pixels(bin.column, map.width, bin.level);
      const Range y = bin_pixels(bin.row, map.height, bin.level);
      const Real mean = total / static_cast<Real>((x.end - x.start) * (y.end - y.start));
      sum += ratio_of<Real>(map, bin.level) * mean * mean;
      if (means) {
        means[planes.means_offset + k * planes.plane_stride + b * planes.bin_stride] = mean;
      }
    }
  }
  return sum;
}

template <typename T, bool kPooled>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>)
    forward_kernel(const __grid_constant__ MapCall call) {
  using Real = Acc<T>;
  const TileIndex at = tile_of_block(call.maps, call.count, static_cast<int>(blockIdx.x));
  const Map& map = call.maps[at.item];
  // The maps of a dropped pathway are not read, nor are its partials by the second stage.
  if (static_cast<const Real*>(call.weights)[map.index] == 0) return;
  Real sum;
  if constexpr (kPooled) {
    alignas(16) __shared__ Real scratch[kScratch<T>];
    auto* means = static_cast<Real*>(call.means);
    if (map.pooling == Pooling::staged) {
      sum = staged_tile<T>(map, at.tile, means, scratch);
    } else if (map.pooling == Pooling::segments) {
      sum = segments_tile<T>(map, at.tile, means, scratch);
    } else {
      sum = flat_tile<T>(map, at.tile, false);
    }
  } else {
    sum = flat_tile<T>(map, at.tile, call.l1);
  }
  const double total = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) call.partials[map.placement.first_partial + at.tile] = total * map.scale;
}

}  // namespace distpro::cuda
