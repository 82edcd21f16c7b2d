#include <type_traits>
#include <vector>

#include "pathway_loss_backward.cuh"
#include "pathway_loss_forward.cuh"

namespace distpro::cuda {
namespace {

// What both directions share of a launch's maps; `call` is LossForward or LossBackward.
template <typename Call>
MapCall maps_of(const PathwayPlan& plan, const Call& call, const LaunchPlan& launch_plan) {
  MapCall maps{};
  maps.weights = call.weights;
  maps.means = const_cast<void*>(static_cast<const void*>(call.means));  // backward only reads
  maps.l1 = plan.distance == Distance::l1;
  for (const int p : launch_plan.items) {
    Map& map = maps.maps[maps.count];
    map = map_of(plan, p);
    map.student = reinterpret_cast<const void*>(call.students[p]);
    map.teacher = reinterpret_cast<const void*>(call.teachers[p]);
    map.placement = launch_plan.placements[maps.count++];
  }
  return maps;
}

}  // namespace

void pathway_loss_forward(const PathwayPlan& plan, const LossForward& call, void* stream) {
  const std::vector<int> first = first_partials(plan.tiling.series);
  with_type(plan.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (const LaunchPlan& launch_plan : plan_launches(plan.tiling.series, kMapsPerLaunch)) {
      MapCall maps = maps_of(plan, call, launch_plan);
      maps.partials = call.partials;
      for (int i = 0; i < maps.count; ++i) {
        maps.maps[i].placement.first_partial = first[maps.maps[i].index];
        choose_forward_pooling<T>(maps.maps[i]);
      }
      launch("pathway_loss forward",
             plan.distance == Distance::hcl ? forward_kernel<T, true> : forward_kernel<T, false>,
             launch_plan.blocks, kThreads, stream, maps);
    }
    launch_sums<Acc<T>>(first, call.partials, call.per_pathway, call.weights, call.loss, stream);
  });
}

void pathway_loss_backward(const PathwayPlan& plan, const LossBackward& call, void* stream) {
  with_type(plan.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (const LaunchPlan& launch_plan : plan_launches(plan.tiling.series, kMapsPerLaunch)) {
      MapCall maps = maps_of(plan, call, launch_plan);
      maps.grad_loss = call.grad_loss;
      maps.grad_per_pathway = call.grad_per_pathway;
      for (int i = 0; i < maps.count; ++i) {
        Map& map = maps.maps[i];
        map.gradient = reinterpret_cast<void*>(call.gradients[map.index]);
        choose_backward_pooling<T>(map);
      }
      launch("pathway_loss backward",
             plan.distance == Distance::hcl ? backward_kernel<T, true> : backward_kernel<T, false>,
             launch_plan.blocks, kThreads, stream, maps);
    }
  });
}

}  // namespace distpro::cuda
