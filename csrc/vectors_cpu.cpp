// Inner products and perturbations on the CPU; partials are added in the order of the tiles.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <vector>

#include "vectors.h"

namespace distpro::cpu {
namespace {

struct Kernels {  // by Dtype
  double (*dot[4])(std::uintptr_t, std::uintptr_t, std::int64_t, std::int64_t);
  void (*perturb[4])(const Perturb&, std::int64_t, std::int64_t, std::int64_t, double);
  const char* name;
};

#define DISTPRO_KERNELS                                           \
  {{dot<float>, dot<BFloat16>, dot<Half>, dot<double>},           \
   {perturb_tile<float>, nullptr, nullptr, perturb_tile<double>}, \
   kName}
#define DISTPRO_KERNEL_FILE "vector_kernels.h"
#include "simd_dispatch.h"

void dots_of_tiles(const VectorPlan& plan, const std::uintptr_t* left, const std::uintptr_t* right,
                   double* partials) {
  const auto run = kernels().dot[static_cast<int>(plan.dtype)];
  const auto tiles = static_cast<std::int64_t>(plan.tiling.tiles.size());
#pragma omp parallel for schedule(static) if (tiles > 1)
  for (std::int64_t i = 0; i < tiles; ++i) {
    const Tile& tile = plan.tiling.tiles[static_cast<std::size_t>(i)];
    partials[i] = run(left[tile.pathway], right[tile.pathway], tile.first_plane, tile.planes);
  }
}

}  // namespace

void pathway_dots(const VectorPlan& plan, const Dots& call) {
  dots_of_tiles(plan, call.left, call.right, call.partials);
  std::vector<double> sums(static_cast<std::size_t>(plan.slots));
  for (std::size_t i = 0; i < plan.tiling.tiles.size(); ++i) {
    const std::int64_t slot = plan.slot_of[static_cast<std::size_t>(plan.tiling.tiles[i].pathway)];
    sums[static_cast<std::size_t>(slot)] += call.partials[i];
  }
  for (std::size_t s = 0; s < sums.size(); ++s) assign(call.dots, plan.dtype, s, sums[s]);
}

void perturb(const VectorPlan& plan, const Perturb& call) {
  const auto run = kernels().perturb[static_cast<int>(plan.dtype)];
  if (!run) throw std::invalid_argument("perturb: float32 or float64 only");
  dots_of_tiles(plan, call.directions, call.directions, call.partials);
  double square = 0;
  for (std::size_t i = 0; i < plan.tiling.tiles.size(); ++i) square += call.partials[i];
  const double norm = std::sqrt(square);
  double epsilon = norm == 0 ? 0 : call.radius / norm;
  if (!std::isfinite(norm)) epsilon = std::numeric_limits<double>::quiet_NaN();
  assign(call.epsilon, plan.dtype, 0, epsilon);

  const auto tiles = static_cast<std::int64_t>(plan.tiling.tiles.size());
#pragma omp parallel for schedule(static) if (tiles > 1)
  for (std::int64_t i = 0; i < tiles; ++i) {
    const Tile& tile = plan.tiling.tiles[static_cast<std::size_t>(i)];
    run(call, tile.pathway, tile.first_plane, tile.planes, epsilon);
  }
}

}  // namespace distpro::cpu
