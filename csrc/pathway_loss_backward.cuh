// One tile of the backward pass: gradient = c * (d + the terms of the pixel's bins).
#pragma once

#include "maps.cuh"

namespace distpro::cuda {

// In planes of more pixels, a pixel's segment is computed each time, not looked up.
constexpr int kLookup = 4096;

__host__ __device__ inline int rectangle_at(int pixel, int height, int width, int columns) {
  const int row = pixel / width;
  return segment_at(row, height) * columns + segment_at(pixel - row * width, width);
}

// The term of one level at a pixel in segments (row, column): the sum over the bins that hold it.
template <int kLevel, typename Real>
__device__ inline Real add_bins(const Map& map, int row, int column, const Real* bins, int stride) {
  const Range rows = bins_of_segment(row, map.height, kLevel);
  const Range columns = bins_of_segment(column, map.width, kLevel);
  Real sum = 0;
  for (int i = rows.start; i < rows.end; ++i) {
    for (int j = columns.start; j < columns.end; ++j) sum += bins[(i * kLevel + j) * stride];
  }
  return sum;
}

// Fills table[segment][plane] for channels_last, [plane][segment] otherwise. `scaled`: workspace
// for the scaled means, laid out alike.
template <bool kChannelsLast, typename Real>
__device__ void fill_table(const Map& map, const Planes& planes, const Real* means, Real* scaled,
                           Real* table) {
  const int bins = map.bins;
  const int columns = segments(map.width);
  const int rectangles = segments(map.height) * columns;
  for (int i = threadIdx.x; i < bins * planes.count; i += kThreads) {
    const int k = kChannelsLast ? i % planes.count : i / bins;
    const int b = kChannelsLast ? i / planes.count : i - k * bins;
    const Bin2d bin = bin_at(b, bins);
    const Range x = bin_pixels(bin.column, map.width, bin.level);
    const Range y = bin_pixels(bin.row, map.height, bin.level);
    const Real area = static_cast<Real>((x.end - x.start) * (y.end - y.start));
    const auto ratio = static_cast<Real>(map.ratio[level_index(bin.level)]);
    scaled[i] =
        ratio * means[planes.means_offset + k * planes.plane_stride + b * planes.bin_stride] / area;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rectangles * planes.count; i += kThreads) {
    const int k = kChannelsLast ? i % planes.count : i / rectangles;
    const int rectangle = kChannelsLast ? i / planes.count : i - k * rectangles;
    const int row = rectangle / columns;
    const int column = rectangle - row * columns;
    const Real* of = scaled + (kChannelsLast ? k : k * bins);
    const int stride = kChannelsLast ? planes.count : 1;
    Real sum = add_bins<1>(map, row, column, of + (bins - 1) * stride, stride);
    if (bins >= 5) sum += add_bins<2>(map, row, column, of + (bins - 5) * stride, stride);
    if (bins == 21) sum += add_bins<4>(map, row, column, of, stride);
    table[i] = sum;
  }
  __syncthreads();
}

template <typename T>
__device__ void fill_zero(T* gradient, const Run& run) {
  const bool wide = aligned(gradient + run.origin) && fits_width(run, kWidth<T>);
  const int width = wide ? kWidth<T> : 1;
  const int lanes = run.columns / width;
  for (int i = threadIdx.x; i < run.rows * lanes; i += kThreads) {
    const int row = i / lanes;
    T* to = gradient + run.origin + row * run.pitch + (i - row * lanes) * width;
    if (wide) {
      store_once<T, kWidth<T>>(to, Pack<T, kWidth<T>>{});
    } else {
      *to = T{};
    }
  }
  for (int i = lanes * width + threadIdx.x; run.rows == 1 && i < run.columns; i += kThreads) {
    gradient[run.origin + i] = T{};
  }
}

template <typename T>
__device__ void flat_gradient(const Map& map, const Run& run, Acc<T> c, bool l1) {
  const T* const maps[2] = {static_cast<const T*>(map.student), static_cast<const T*>(map.teacher)};
  T* gradient = static_cast<T*>(map.gradient);
  const bool wide = fits_width(run, kWidth<T>) &&
                    aligned(maps[0] + run.origin, maps[1] + run.origin, gradient + run.origin);
  walk_all(maps, run, wide, [&](auto lanes, int, int, std::int64_t offset, auto& x) {
    constexpr int V = decltype(lanes)::value;
    Acc<T> g[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const Acc<T> d = x[0][j] - x[1][j];
      g[j] = !l1 || d == 0 || d != d ? c * d
             : d > 0                 ? c
                                     : -c;  // sign(0) is 0, that of a NaN is NaN
    }
    store_narrowed<T>(gradient + offset, g);
  });
}

template <bool kChannelsLast, typename T>
__device__ void pooled_gradient(const Map& map, int tile, Acc<T> c, const Acc<T>* means,
                                Acc<T>* scratch, unsigned char* lookup) {
  using Real = Acc<T>;
  const T* const maps[2] = {static_cast<const T*>(map.student), static_cast<const T*>(map.teacher)};
  T* gradient = static_cast<T*>(map.gradient);
  const int area = map.height * map.width;
  const int columns = segments(map.width);
  const int rectangles = segments(map.height) * columns;
  const bool look_up = area <= kLookup;
  const auto rectangle_of = [&](int pixel) {
    return look_up ? lookup[pixel] : rectangle_at(pixel, map.height, map.width, columns);
  };
  for (int pixel = threadIdx.x; look_up && pixel < area; pixel += kThreads) {
    lookup[pixel] = static_cast<unsigned char>(rectangle_at(pixel, map.height, map.width, columns));
  }
  for (int skip = 0; skip < map.tile_planes; skip += map.chunk) {
    const Planes planes = planes_at(map, tile, skip, map.chunk);
    if (planes.count <= 0) break;
    if (skip > 0) __syncthreads();  // the previous chunk is done
    Real* table = scratch + map.bins * planes.count;
    fill_table<kChannelsLast>(map, planes, means, scratch, table);
    const Run& run = planes.run;
    const bool wide = fits_width(run, kWidth<T>) &&
                      aligned(maps[0] + run.origin, maps[1] + run.origin, gradient + run.origin);
    walk_all(maps, run, wide, [&](auto lanes, int row, int column, std::int64_t offset, auto& x) {
      constexpr int V = decltype(lanes)::value;
      Real g[V];
      if constexpr (kChannelsLast) {
        const Real* from = table + rectangle_of(row) * planes.count + column;
#pragma unroll
        for (int j = 0; j < V; ++j) g[j] = c * (x[0][j] - x[1][j] + from[j]);
      } else {
        const int k = column / area;
        int pixel = column - k * area;
        const Real* from = table + k * rectangles;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          g[j] = c * (x[0][j] - x[1][j] + from[rectangle_of(pixel)]);
          if (++pixel == area) {
            pixel = 0;
            from += rectangles;
          }
        }
      }
      store_narrowed<T>(gradient + offset, g);
    });
  }
}

template <typename T, bool kPooled>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm<T>)
    backward_kernel(const __grid_constant__ MapCall call) {
  using Real = Acc<T>;
  const TileIndex at = tile_of_block(call.maps, call.count, static_cast<int>(blockIdx.x));
  const Map& map = call.maps[at.item];
  // In double: the two terms may cancel, and the scale of a large map leaves float little range.
  const double weight = static_cast<const Real*>(call.weights)[map.index];
  const double coefficient = weight == 0
                                 ? 0
                                 : weight * *static_cast<const Real*>(call.grad_loss) +
                                       static_cast<const Real*>(call.grad_per_pathway)[map.index];
  const Run run = planes_at(map, at.tile, 0, map.tile_planes).run;
  if (coefficient == 0) return fill_zero(static_cast<T*>(map.gradient), run);
  const auto c = static_cast<Real>((call.l1 ? 1 : 2) * map.scale * coefficient);
  if constexpr (kPooled) {
    alignas(16) __shared__ Real scratch[kScratch<T>];
    __shared__ unsigned char lookup[kLookup];
    const auto* means = static_cast<const Real*>(call.means);
    if (map.pooling != Pooling::none) {
      return map.channels_last ? pooled_gradient<true, T>(map, at.tile, c, means, scratch, lookup)
                               : pooled_gradient<false, T>(map, at.tile, c, means, scratch, lookup);
    }
  }
  flat_gradient<T>(map, run, c, call.l1);
}

}  // namespace distpro::cuda
