// A pathway as the kernels see it, and the arithmetic that turns its tiles into addresses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "bins.cuh"
#include "blocks.cuh"
#include "pathway_loss.h"

namespace distpro::cuda {

// Elements of shared memory that a block has for its planes: 32 KB.
template <typename T>
constexpr int kScratch = 32768 / sizeof(Acc<T>);

// Blocks per multiprocessor: four of 256 threads leave each thread 64 registers, which the kernels
// need, and fit in the shared memory of an A100 (164 KB) and an H100 (228 KB).
template <typename T>
constexpr int kBlocksPerSm = sizeof(T) == 8 ? 2 : 4;

constexpr int kMapsPerLaunch = 128;

// How the bins of a tile are computed; chosen per pathway, from its shape.
enum class Pooling : int {
  none,      // no bins: element-wise work
  staged,    // differences of whole planes are staged in shared memory
  segments,  // threads add up segments of planes: channels_last, and planes that do not fit
};

struct Map {
  const void* student;
  const void* teacher;
  void* gradient;             // backward
  std::int64_t planes;        // N * C
  std::int64_t means_offset;  // of the pathway
  double scale;               // weight of the full map / number of its elements
  double ratio[3];            // of the levels 4, 2, 1: weight of one squared bin mean / `scale`
  int index;                  // of the pathway
  int channels, height, width;
  int bins;  // 21, 5, 1 or 0
  bool channels_last;
  Pooling pooling;
  int tile_planes;
  int chunk;  // planes in shared memory at a time
  Placement placement;
};

// The parameters of a launch.
struct MapCall {
  const void* weights;
  const void* grad_loss;         // backward
  const void* grad_per_pathway;  // backward
  void* means;
  double* partials;  // forward
  bool l1;
  int count;
  Map maps[kMapsPerLaunch];
};
// The limit for a kernel's parameters (sm_70 and up, CUDA 12.1 and up).
static_assert(sizeof(MapCall) <= 32764);

// Some planes of a map: their elements, and where their bin means are: that of plane k and bin b at
// means_offset + k * plane_stride + b * bin_stride.
struct Planes {
  Run run;
  int count;
  std::int64_t means_offset;
  std::int64_t plane_stride;
  std::int64_t bin_stride;
};

// At most `most` planes of tile `tile`, from its plane `skip` on; count <= 0 beyond its end.
__host__ __device__ inline Planes planes_at(const Map& map, int tile, int skip, int most) {
  const int area = map.height * map.width;
  std::int64_t plane, end;  // of the tile
  if (map.channels_last) {
    const int tiles = (map.channels + map.tile_planes - 1) / map.tile_planes;  // of an image
    plane = static_cast<std::int64_t>(tile / tiles) * map.channels;
    end = plane + map.channels;
    plane += tile % tiles * map.tile_planes;
  } else {
    plane = static_cast<std::int64_t>(tile) * map.tile_planes;
    end = map.planes;
  }
  if (end > plane + map.tile_planes) end = plane + map.tile_planes;
  plane += skip;
  const int count = end - plane < most ? static_cast<int>(end - plane) : most;
  if (!map.channels_last) {
    return {{plane * area, 1, count * area, 0},
            count,
            map.means_offset + plane * map.bins,
            map.bins,
            1};
  }
  const std::int64_t image = plane / map.channels;
  const std::int64_t channel = plane % map.channels;
  return {{image * area * map.channels + channel, area, count, map.channels},
          count,
          map.means_offset + image * map.bins * map.channels + channel,
          1,
          map.channels};
}

// Neighbouring planes of 8 x 8 or 16 x 16 floats start in the same bank of shared memory, so that
// threads reading the same row of several planes would have bank conflicts. This spreads them: it
// permutes groups of 8 floats within 32.
struct Swizzle {
  int shift;
  __host__ __device__ explicit Swizzle(int area) : shift(5) {
    while (area >> shift > 1) ++shift;
  }
  __host__ __device__ int operator()(int i) const {
    const int plane = i >> shift;
    return i ^ (plane & 1) << 4 ^ (plane & 2) << 2;
  }
};

// Positions in shared memory of `planes` staged planes. Each column of each plane is later
// overwritten, from its top, by its row bins; if a plane has fewer rows than row bins (H is 5 or
// 6), the last bins are stored after all planes.
struct Cells {
  int planes, height, width;
  Swizzle swizzle;

  __host__ __device__ Cells(int planes, int height, int width)
      : planes(planes), height(height), width(width), swizzle(height * width) {}
  __host__ __device__ int element(int i) const { return swizzle(i); }
  // Column `column` of plane k has the number k * width + column.
  __host__ __device__ int row_bin(int bin, int k, int column) const {
    if (bin < height) return swizzle((k * height + bin) * width + column);
    const int behind = (planes * height * width + 31) / 32 * 32;
    return behind + ((bin - height) * planes + k) * width + column;
  }
  // The most planes that fit in `room` elements, a multiple of 32; a plane has `bins` row bins.
  __host__ __device__ static int fit(int room, int height, int width, int bins) {
    const int more = bins > height ? bins - height : 0;
    return (room - (more ? 31 : 0)) / ((height + more) * width);
  }
};

// -- host ------------------------------------------------------------

inline void require(bool good, std::size_t pathway, const char* what) {
  if (!good) {
    throw std::invalid_argument("pathway_loss: pathway " + std::to_string(pathway) + " " + what);
  }
}

// All but the addresses, the pooling with its chunk, and the placement.
inline Map map_of(const PathwayPlan& plan, std::size_t index) {
  const Pathway& pathway = plan.pathways[index];
  const std::int64_t tile_planes = plan.tiling.series[index].planes;
  constexpr std::int64_t kMost = 1 << 30;
  const auto [n, c, h, w] = pathway.shape;
  require(h < kMaxEdge && w < kMaxEdge && h * w <= kMost / tile_planes, index,
          "has planes too large for the CUDA kernels: a tile would have 2^30 elements or more");
  require(c < kMost, index, "has 2^30 channels or more");
  Map map{};
  map.planes = n * c;
  map.means_offset = pathway.means_offset;
  const double full = pathway.levels.front().weight;
  map.scale = full / (static_cast<double>(n) * c * h * w);
  for (const Level& l : pathway.levels) {
    if (l.level == 0) continue;
    map.ratio[level_index(static_cast<int>(l.level))] =
        l.weight / full * static_cast<double>(h * w) / static_cast<double>(l.level * l.level);
  }
  map.index = static_cast<int>(index);
  map.channels = static_cast<int>(c);
  map.height = static_cast<int>(h);
  map.width = static_cast<int>(w);
  map.bins = static_cast<int>(pathway.bins);
  map.channels_last = pathway.layout == Layout::channels_last;
  map.tile_planes = static_cast<int>(tile_planes);
  return map;
}

// Planes of a chunk: at most `fit`, in groups that align its start as the plan aligns a tile's.
inline int chunk_of(const Map& map, int fit) {
  const int group = map.channels_last ? 16 : 8;
  if (fit >= map.tile_planes) return map.tile_planes;
  return fit >= group ? fit - fit % group : fit;
}

template <typename T>
void choose_forward_pooling(Map& map) {
  if (map.bins == 0) return;
  const int fit = Cells::fit(kScratch<T>, map.height, map.width, row_bins(map.bins));
  map.pooling = map.channels_last || fit == 0 ? Pooling::segments : Pooling::staged;
  if (map.pooling == Pooling::staged) {
    map.chunk = chunk_of(map, fit);
  } else {
    const int rectangles = segments(map.height) * segments(map.width);
    map.chunk = map.channels_last ? chunk_of(map, kScratch<T> / rectangles) : 1;
  }
}

template <typename T>
void choose_backward_pooling(Map& map) {
  if (map.bins == 0) return;
  map.pooling = Pooling::segments;
  const int rectangles = segments(map.height) * segments(map.width);
  map.chunk = chunk_of(map, kScratch<T> / (rectangles + map.bins));
}

}  // namespace distpro::cuda
