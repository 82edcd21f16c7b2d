// What a call of each operator needs besides addresses, from shapes alone.
#include <stdexcept>

#include "pathway_loss.h"
#include "vectors.h"

namespace distpro {

PathwayPlan pathway_plan(Dtype dtype, Distance distance, const std::vector<Shape>& shapes,
                         const std::vector<Layout>& layouts,
                         const std::vector<std::int64_t>& teacher_of, std::int64_t tile_elements,
                         std::int64_t tile_channels) {
  for (const Layout layout : layouts) {
    if (layout == Layout::channels_last && distance != Distance::hcl) {
      throw std::invalid_argument("pathway_plan: l2 and l1 need layout planes, not channels_last");
    }
  }
  PathwayPlan plan{dtype, distance,
                   {},    tile_plan(shapes, teacher_of, tile_elements, layouts, tile_channels),
                   0,     {}};
  for (std::size_t p = 0; p < shapes.size(); ++p) {
    Pathway pathway{
        shapes[p], layouts.empty() ? Layout::planes : layouts[p], {{0, 1.0}}, 0, 0, 0, 0, 0, 0};
    if (distance == Distance::hcl) pathway.levels = hcl_levels(shapes[p][2]);
    for (const Level& l : pathway.levels) pathway.bins += l.level * l.level;
    pathway.means_offset = plan.means_size;
    plan.means_size += shapes[p][0] * shapes[p][1] * pathway.bins;
    plan.pathways.push_back(pathway);
  }
  for (std::size_t t = 0; t < plan.tiles.size(); ++t) {
    Pathway& pathway = plan.pathways[static_cast<std::size_t>(plan.tiles[t].pathway)];
    const auto index = static_cast<std::int64_t>(t);
    const auto teacher = [&](std::size_t tile) {
      return teacher_of[static_cast<std::size_t>(plan.tiles[tile].pathway)];
    };
    if (t == 0 || teacher(t) != teacher(t - 1)) plan.map_tiles.push_back(index);
    if (pathway.tiles == 0) {
      pathway.first_tile = index;
      pathway.tile_planes = plan.tiles[t].planes;
    }
    if (pathway.tiles == 1) pathway.tile_stride = index - pathway.first_tile;
    ++pathway.tiles;
  }
  plan.map_tiles.push_back(static_cast<std::int64_t>(plan.tiles.size()));
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
  std::vector<Shape> shapes;
  for (const std::int64_t size : sizes) shapes.push_back({size, 1, 1, 1});
  return {dtype, sizes, slot_of, slots, tile_plan(shapes, right_of, tile_elements)};
}

VectorPlan perturb_plan(Dtype dtype, const std::vector<std::int64_t>& sizes,
                        std::int64_t tile_elements) {
  std::vector<Shape> shapes;
  std::vector<std::int64_t> order;
  for (const std::int64_t size : sizes) {
    order.push_back(static_cast<std::int64_t>(order.size()));
    shapes.push_back({size, 1, 1, 1});
  }
  return {dtype, sizes, {}, 0, tile_plan(shapes, order, tile_elements)};
}

}  // namespace distpro
