// What a call of each operator needs besides addresses, from shapes alone.
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "pathway_loss.h"
#include "vectors.h"

namespace distpro {
namespace {

Tiling flat_tiling(const std::vector<std::int64_t>& sizes,
                   const std::vector<std::int64_t>& right_of, std::int64_t tile_elements) {
  std::vector<Shape> shapes;
  for (const std::int64_t size : sizes) shapes.push_back({size, 1, 1, 1});
  const std::vector<Layout> layouts(sizes.size(), Layout::planes);
  return tile_plan(shapes, layouts, right_of, tile_elements, 1);
}

}  // namespace

PathwayPlan pathway_plan(Dtype dtype, Distance distance, const std::vector<Shape>& shapes,
                         const std::vector<Layout>& layouts,
                         const std::vector<std::int64_t>& teacher_of, std::int64_t tile_elements,
                         std::int64_t tile_channels) {
  for (const Layout layout : layouts) {
    if (layout == Layout::channels_last && distance != Distance::hcl) {
      throw std::invalid_argument("pathway_plan: l2 and l1 need layout planes, not channels_last");
    }
  }
  PathwayPlan plan{};
  plan.dtype = dtype;
  plan.distance = distance;
  plan.tiling = tile_plan(shapes, layouts, teacher_of, tile_elements, tile_channels);
  for (std::size_t p = 0; p < shapes.size(); ++p) {
    Pathway pathway{shapes[p], layouts[p], {{0, 1.0}}, 0, plan.means_size};
    if (distance == Distance::hcl) pathway.levels = hcl_levels(shapes[p][2]);
    for (const Level& l : pathway.levels) pathway.bins += l.level * l.level;
    plan.means_size += shapes[p][0] * shapes[p][1] * pathway.bins;
    plan.pathways.push_back(pathway);
  }
  return plan;
}

VectorPlan dots_plan(Dtype dtype, const std::vector<std::int64_t>& sizes,
                     const std::vector<std::int64_t>& right_of,
                     const std::vector<std::int64_t>& slot_of, std::int64_t slots,
                     std::int64_t tile_elements) {
  if (slot_of.size() != sizes.size()) {
    throw std::invalid_argument("dots_plan: each array needs a slot");
  }
  for (const std::int64_t slot : slot_of) {
    if (slot < 0 || slot >= slots) throw std::invalid_argument("dots_plan: a slot is out of range");
  }
  return {dtype, sizes, slot_of, slots, flat_tiling(sizes, right_of, tile_elements)};
}

VectorPlan perturb_plan(Dtype dtype, const std::vector<std::int64_t>& sizes,
                        std::int64_t tile_elements) {
  std::vector<std::int64_t> apart(sizes.size());  // no two arrays share anything
  std::iota(apart.begin(), apart.end(), 0);
  return {dtype, sizes, {}, 0, flat_tiling(sizes, apart, tile_elements)};
}

}  // namespace distpro
