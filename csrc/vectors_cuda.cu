#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "blocks.cuh"
#include "vectors.h"

namespace distpro::cuda {
namespace {

constexpr int kArraysPerLaunch = 256;

struct Array {
  const void* left;   // or the parameter
  const void* right;  // or the direction
  void* plus;         // perturb
  void* minus;
  std::int64_t size;
  int tile_elements;
  Placement placement;
};

// The parameters of a launch.
struct ArrayCall {
  double* partials;     // dots and the norm
  const void* epsilon;  // perturb
  int count;
  Array arrays[kArraysPerLaunch];
};
static_assert(sizeof(ArrayCall) <= 32764);  // see MapCall

__device__ inline Run run_of(const Array& array, int tile) {
  const std::int64_t first = static_cast<std::int64_t>(tile) * array.tile_elements;
  const std::int64_t left = array.size - first;
  return {first, 1, left < array.tile_elements ? static_cast<int>(left) : array.tile_elements, 0};
}

// The partial of one tile: the inner product of two operands, or of one with itself, which is then
// read once. In double: products of floats are exact and neither overflow nor underflow.
template <typename T, int N>
__device__ void dot_tile(const ArrayCall& call, const TileIndex& at,
                         const T* const (&operands)[N]) {
  const Array& array = call.arrays[at.item];
  const Run run = run_of(array, at.tile);
  const bool wide = aligned(operands[0] + run.origin, operands[N - 1] + run.origin);
  double sum = 0;
  walk_all(operands, run, wide, [&](auto lanes, int, int, std::int64_t, auto& x) {
#pragma unroll
    for (int j = 0; j < decltype(lanes)::value; ++j) {
      sum += static_cast<double>(x[0][j]) * static_cast<double>(x[N - 1][j]);
    }
  });
  const double total = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) call.partials[array.placement.first_partial + at.tile] = total;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) dots_kernel(const __grid_constant__ ArrayCall call) {
  const TileIndex at = tile_of_block(call.arrays, call.count, static_cast<int>(blockIdx.x));
  const Array& array = call.arrays[at.item];
  dot_tile<T>(call, at, {static_cast<const T*>(array.left), static_cast<const T*>(array.right)});
}

template <typename T>
__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ ArrayCall call) {
  const TileIndex at = tile_of_block(call.arrays, call.count, static_cast<int>(blockIdx.x));
  dot_tile<T>(call, at, {static_cast<const T*>(call.arrays[at.item].right)});
}

template <typename Real>
__global__ void __launch_bounds__(kFinishThreads)
    epsilon_kernel(const double* partials, int count, double radius, Real* epsilon) {
  double sum = 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < count; i += kFinishThreads) sum += partials[i];
  const double norm = sqrt(block_sum<kFinishThreads>(sum));
  if (threadIdx.x != 0) return;
  // NaN if the norm is not finite: norm - norm is 0 only for finite norms.
  *epsilon = static_cast<Real>(norm == 0 ? 0 : radius / norm + (norm - norm));
}

template <typename T>
__global__ void __launch_bounds__(kThreads) perturb_kernel(const __grid_constant__ ArrayCall call) {
  const TileIndex at = tile_of_block(call.arrays, call.count, static_cast<int>(blockIdx.x));
  const Array& array = call.arrays[at.item];
  const T* const both[2] = {static_cast<const T*>(array.left), static_cast<const T*>(array.right)};
  T* plus = static_cast<T*>(array.plus);
  T* minus = static_cast<T*>(array.minus);
  const T epsilon = *static_cast<const T*>(call.epsilon);
  const Run run = run_of(array, at.tile);
  const bool wide =
      aligned(both[0] + run.origin, both[1] + run.origin, plus + run.origin, minus + run.origin);
  walk_all(both, run, wide, [&](auto lanes, int, int, std::int64_t offset, auto& x) {
    constexpr int V = decltype(lanes)::value;
    T up[V], down[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      up[j] = x[0][j] + epsilon * x[1][j];
      down[j] = x[0][j] - epsilon * x[1][j];
    }
    store_narrowed<T>(plus + offset, up);
    store_narrowed<T>(minus + offset, down);
  });
}

// Calls visit(ArrayCall, blocks) for every launch; fill(Array, its index) sets the addresses.
template <typename Fill, typename Visit>
void for_each_launch(const VectorPlan& plan, const std::vector<int>& first_partial,
                     double* partials, Fill&& fill, Visit&& visit) {
  for (const TileSeries& series : plan.tiling.series) {  // before the first launch
    if (series.planes > 1 << 30) throw std::invalid_argument("tiles of more than 2^30 elements");
  }
  for (const LaunchPlan& launch_plan : plan_launches(plan.tiling.series, kArraysPerLaunch)) {
    ArrayCall arrays{};
    arrays.partials = partials;
    for (const int i : launch_plan.items) {
      Array& array = arrays.arrays[arrays.count];
      array.size = plan.sizes[i];
      array.tile_elements = static_cast<int>(plan.tiling.series[i].planes);
      array.placement = launch_plan.placements[arrays.count++];
      array.placement.first_partial = first_partial[i];
      fill(array, i);
    }
    visit(arrays, launch_plan.blocks);
  }
}

}  // namespace

void pathway_dots(const VectorPlan& plan, const Dots& call, void* stream) {
  // The partials of a slot are contiguous: its arrays one after another.
  std::vector<int> order(plan.sizes.size()), first_partial(plan.sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return plan.slot_of[a] < plan.slot_of[b]; });
  std::vector<int> first(static_cast<std::size_t>(plan.slots) + 1);
  int next = 0;
  for (const int i : order) {
    first_partial[i] = next;
    next += static_cast<int>(plan.tiling.series[i].count);
    first[plan.slot_of[i] + 1] = next;
  }
  for (std::size_t slot = 1; slot < first.size(); ++slot) {
    first[slot] = std::max(first[slot], first[slot - 1]);  // a slot without arrays sums nothing
  }
  with_type(plan.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_each_launch(
        plan, first_partial, call.partials,
        [&](Array& array, int i) {
          array.left = reinterpret_cast<const void*>(call.left[i]);
          array.right = reinterpret_cast<const void*>(call.right[i]);
        },
        [&](const ArrayCall& arrays, int blocks) {
          launch("pathway_dots", dots_kernel<T>, blocks, kThreads, stream, arrays);
        });
    launch_sums<Acc<T>>(first, call.partials, call.dots, nullptr, nullptr, stream);
  });
}

void perturb(const VectorPlan& plan, const Perturb& call, void* stream) {
  const std::vector<int> first_partial = first_partials(plan.tiling.series);
  const auto fill = [&](Array& array, int i) {
    array.left = reinterpret_cast<const void*>(call.parameters[i]);
    array.right = reinterpret_cast<const void*>(call.directions[i]);
    array.plus = reinterpret_cast<void*>(call.plus[i]);
    array.minus = reinterpret_cast<void*>(call.minus[i]);
  };
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_each_launch(plan, first_partial, call.partials, fill,
                    [&](const ArrayCall& arrays, int blocks) {
                      launch("perturb norm", norm_kernel<T>, blocks, kThreads, stream, arrays);
                    });
    launch("perturb epsilon", epsilon_kernel<T>, 1, kFinishThreads, stream, call.partials,
           first_partial.back(), call.radius, static_cast<T*>(call.epsilon));
    for_each_launch(plan, first_partial, call.partials, fill, [&](ArrayCall arrays, int blocks) {
      arrays.epsilon = call.epsilon;
      launch("perturb", perturb_kernel<T>, blocks, kThreads, stream, arrays);
    });
  };
  if (plan.dtype == Dtype::float32) return run(static_cast<float*>(nullptr));
  if (plan.dtype == Dtype::float64) return run(static_cast<double*>(nullptr));
  throw std::invalid_argument("perturb: parameters are float32 or float64");
}

}  // namespace distpro::cuda
