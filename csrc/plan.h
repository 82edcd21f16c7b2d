// How the fused kernels walk the data. Plain arithmetic on shapes: no tensors, no device, so that
// it can be tested without a GPU. A bad argument throws std::invalid_argument (ValueError).
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "types.h"

namespace distpro {

// One level of an HCL: 0 is the full map, l > 0 the l x l adaptive average pooling.
struct Level {
  std::int64_t level;
  double weight;
};

// The levels of maps of this height with their weights, which sum to 1: the full map, then each l
// in (4, 2, 1) with l < height. The raw weights 1, 1/2, 1/4, 1/8 go to the levels in use, in order.
std::vector<Level> hcl_levels(std::int64_t height);

// Pixels [start, end) of one bin along one edge.
struct Bin {
  std::int64_t start;
  std::int64_t end;
};

// Adaptive average pooling along one edge: floor(i size / level) to ceil((i + 1) size / level).
// Bins overlap where `level` does not divide `size`.
std::vector<Bin> pool_bins(std::int64_t size, std::int64_t level);

// Planes [first_plane, first_plane + planes) of a pathway's N * C planes of H * W elements.
struct Tile {
  std::int64_t pathway;
  std::int64_t first_plane;
  std::int64_t planes;
};

// The tiles of one pathway: tiles[first + k * stride], k < count. All but the last of a pathway, or
// of an image if channels_last, have `planes` planes.
struct TileSeries {
  std::int64_t first;
  std::int64_t stride;
  std::int64_t count;
  std::int64_t planes;
};

struct Tiling {
  std::vector<Tile> tiles;
  std::vector<TileSeries> series;        // of each pathway
  std::vector<std::int64_t> map_starts;  // where each teacher map's tiles start; then their end
};

using Shape = std::array<std::int64_t, 4>;  // N, C, H, W

// Cuts every pathway into tiles of whole planes, at most `tile_elements` elements each but at least
// one plane. Teacher maps come in the order of their first pathway. Within a map the tiles go range
// by range, and all its pathways visit a range one after another, so that they find it in L2.
// Tiles of 8 planes or more hold a multiple of 8, except for the last one of a pathway: each then
// starts on a 16-byte boundary of a dense map, whatever H * W and the (2-byte or wider) type.
// A channels_last tile stays within one image; it holds a multiple of `tile_channels` channels,
// except for the last one of an image, so that each of its pixels is a run of whole vectors.
Tiling tile_plan(const std::vector<Shape>& shapes, const std::vector<Layout>& layouts,
                 const std::vector<std::int64_t>& teacher_of, std::int64_t tile_elements,
                 std::int64_t tile_channels);

}  // namespace distpro
