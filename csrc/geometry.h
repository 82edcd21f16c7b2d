// The bins of an HCL's levels over a plane. The bounds of all bins cut each axis into segments:
// runs of rows (or columns) that lie in the same bins at every level. A segment of rows and one of
// columns meet in a rectangle. Each pixel is read once and added to its rectangle, and bins are
// sums of rectangles, even if they overlap.
#pragma once

#include <cstdint>

#include "pathway_loss.h"

namespace distpro {

constexpr int kMaxSegments = 9;  // level 4 has at most 8 edges, level 2 adds at most 2
constexpr int kMaxLevels = 3;    // 4, 2 and 1; without the full map
constexpr int kMaxBins = 21;

struct Axis {
  int segments;
  std::int64_t edge[kMaxSegments + 1];  // segment i is [edge[i], edge[i + 1])
  int first[kMaxLevels][kMaxSegments];  // the bins of a level that contain the segment:
  int end[kMaxLevels][kMaxSegments];    // [first, end)
};

struct BinList {
  int count;
  int bin[kMaxBins];
};

struct Geometry {
  Distance distance;
  Layout layout;
  std::int64_t n, c, h, w;
  int levels;                 // besides the full map
  int level[kMaxLevels];      // 4, 2, 1 in the order used
  int first_bin[kMaxLevels];  // where the level's bins start among all
  int bins;
  Axis rows, columns;
  // The bins that contain the rectangle of a segment of rows and one of columns.
  BinList bins_containing[kMaxSegments][kMaxSegments];
  double inverse_area[kMaxBins];     // 1 / pixels of a bin
  double gradient_factor[kMaxBins];  // of a bin's mean in the gradient: 2 * bin_weight / pixels
  double bin_weight[kMaxLevels];     // of a squared bin mean: weight / (N * C * level^2)
  double element_weight;             // of an element's square or size: weight / (N * C * H * W)
};

Geometry geometry(const Pathway& pathway, Distance distance);

}  // namespace distpro
