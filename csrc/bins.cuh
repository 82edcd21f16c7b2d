// Integer arithmetic of the pooling levels 4, 2 and 1 along one edge of a map. Also host code, so
// that it can be tested without a GPU. Edges are below kMaxEdge: four times an edge fits an int.
#pragma once

#include <cuda_runtime.h>

namespace distpro::cuda {

constexpr int kMaxEdge = 1 << 28;

struct Range {
  int start;
  int end;
};

// Levels are 1, 2 and 4, and half a level is the shift that divides by it; a division by a number
// known only at run time takes some 30 instructions.
__host__ __device__ inline int divide_by_level(int x, int level) { return x >> (level >> 1); }

// Pixels of bin `i`, as pool_bins in plan.h computes them.
__host__ __device__ inline Range bin_pixels(int i, int size, int level) {
  return {divide_by_level(i * size, level), divide_by_level((i + 1) * size + level - 1, level)};
}

// The bounds of all bins cut an edge into segments, and every bin is a run of segments. If 4
// divides the edge, the segments are its quarters. Otherwise neighbouring quarters may share a
// pixel, and there are seven segments, some of them empty: quarter, shared pixel, quarter, shared
// pixel, ... An edge of one pixel is a single segment, which is in every bin. A segment of rows and
// one of columns meet in a rectangle.
__host__ __device__ inline int segments(int size) { return size % 4 == 0 ? 4 : size == 1 ? 1 : 7; }

// Start of segment `s` of seven: some quarters of the edge, rounded up or down.
__host__ __device__ inline int start_of_seventh(int s, int size) {
  return ((s + 1) / 2 * size + (s % 2 == 0 ? 3 : 0)) / 4;
}

__host__ __device__ inline Range segment_pixels(int s, int size) {
  if (segments(size) == 7) return {start_of_seventh(s, size), start_of_seventh(s + 1, size)};
  return size == 1 ? Range{0, 1} : Range{s * (size / 4), (s + 1) * (size / 4)};
}

__host__ __device__ inline int segment_at(int x, int size) {
  if (size == 1) return 0;
  const int quarter = 4 * x / size;
  return size % 4 == 0 ? quarter : quarter + (4 * x + 3) / size;
}

// The bins that segment `s` belongs to.
__host__ __device__ inline Range bins_of_segment(int s, int size, int level) {
  if (size == 1) return {0, level};
  if (size % 4 == 0) return {s * level / 4, s * level / 4 + 1};
  return {s * level / 8, (s + 1) * level / 8 + 1};
}

// The segments that make up bin `i`.
__host__ __device__ inline Range segments_of_bin(int i, int size, int level) {
  if (size == 1) return {0, 1};
  if (size % 4 == 0) return {divide_by_level(i * 4, level), divide_by_level((i + 1) * 4, level)};
  const int start = divide_by_level(i * 8, level) - 1;
  const int end = divide_by_level((i + 1) * 8, level);
  return {start < 0 ? 0 : start, end > 7 ? 7 : end};
}

// A plane has 21, 5 or 1 bins: those of the levels (4, 2, 1), (2, 1) or (1), in this order.
struct Bin2d {
  int level;
  int row;
  int column;
};

__host__ __device__ inline Bin2d bin_at(int b, int bins) {
  if (b >= bins - 1) return {1, 0, 0};
  if (b >= bins - 5) return {2, (b - (bins - 5)) / 2, (b - (bins - 5)) % 2};
  return {4, b / 4, b % 4};
}

// Number of bins along the rows alone, over all levels: 4 + 2 + 1, 2 + 1 or 1.
__host__ __device__ inline int row_bins(int bins) { return bins == 21 ? 7 : bins == 5 ? 3 : 1; }

// The row bin whose columns a bin of this level and row adds up.
__host__ __device__ inline int row_bin_at(int level, int row, int bins) {
  return row_bins(bins) - (2 * level - 1) + row;
}

__host__ __device__ inline int level_index(int level) {
  return level == 4 ? 0 : level == 2 ? 1 : 2;
}

}  // namespace distpro::cuda
