// The pathway loss on the CPU: tiles over OpenMP threads. Which thread does a tile never changes its
// result, and partials are added up in the order of the tiles: the same bits with any thread count.
#include "pathway_loss.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "geometry.h"

namespace distpro::cpu {
namespace {

#include "storage.h"
//
#include "pathway_kernels.h"

using ForwardTile = double (*)(const Geometry&, std::int64_t, std::int64_t, const void*, const void*,
                               void*, void*);
using BackwardTile = void (*)(const Geometry&, std::int64_t, std::int64_t, const void*, const void*,
                              void*, const void*, double, void*);
constexpr ForwardTile kForward[] = {forward_tile<float>, forward_tile<BFloat16>, forward_tile<Half>,
                                    forward_tile<double>};
constexpr BackwardTile kBackward[] = {backward_tile<float>, backward_tile<BFloat16>,
                                      backward_tile<Half>, backward_tile<double>};

std::size_t accumulation_size(Dtype dtype) {
  return dtype == Dtype::float64 ? sizeof(double) : sizeof(float);
}

double value(const void* from, Dtype dtype, std::size_t index = 0) {
  return dtype == Dtype::float64 ? static_cast<const double*>(from)[index]
                                 : static_cast<const float*>(from)[index];
}

void assign(void* to, Dtype dtype, std::size_t index, double x) {
  if (dtype == Dtype::float64) {
    static_cast<double*>(to)[index] = x;
  } else {
    static_cast<float*>(to)[index] = static_cast<float>(x);
  }
}

const void* address(std::uintptr_t number) { return reinterpret_cast<const void*>(number); }

int thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

int threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// The geometry of each pathway, and memory of its own for each thread.
class Workplace {
 public:
  explicit Workplace(const PathwayPlan& plan) {
    std::int64_t most = 0;  // doubles: sums and squares of a row or tile, and bins that are not kept
    for (const Pathway& p : plan.pathways) {
      geometries_.push_back(geometry(p, plan.distance));
      const std::int64_t lanes = p.layout == Layout::channels_last ? p.tile_planes : 1;
      most = std::max(most, 3 * std::max(p.shape[3], lanes) + p.bins * lanes);
    }
    stride_ = static_cast<std::size_t>(most + 15) / 8 * 8;  // 64 bytes apart: no line is shared
    scratch_.resize(stride_ * static_cast<std::size_t>(threads()));
  }

  const Geometry& geometry_of(std::size_t pathway) const { return geometries_[pathway]; }
  void* scratch() { return scratch_.data() + stride_ * static_cast<std::size_t>(thread()); }

 private:
  std::vector<Geometry> geometries_;
  std::vector<double> scratch_;
  std::size_t stride_;
};

}  // namespace

void pathway_loss_forward(const PathwayPlan& plan, const LossForward& call) {
  Workplace work(plan);
  const ForwardTile run = kForward[static_cast<int>(plan.dtype)];
  const std::size_t size = accumulation_size(plan.dtype);
  const auto tiles = static_cast<std::int64_t>(plan.tiles.size());
#pragma omp parallel for schedule(static) if (tiles > 1)
  for (std::int64_t i = 0; i < tiles; ++i) {
    const Tile& tile = plan.tiles[static_cast<std::size_t>(i)];
    const auto p = static_cast<std::size_t>(tile.pathway);
    double& partial = call.partials[i];
    if (value(call.weights, plan.dtype, p) == 0) {
      partial = 0;
      continue;
    }
    char* means = static_cast<char*>(call.means);
    if (means) means += static_cast<std::size_t>(plan.pathways[p].first_mean) * size;
    partial = run(work.geometry_of(p), tile.first_plane, tile.planes, address(call.students[p]),
                  address(call.teachers[p]), means, work.scratch());
  }

  double loss = 0;
  for (std::size_t p = 0; p < plan.pathways.size(); ++p) {
    const Pathway& pathway = plan.pathways[p];
    double sum = 0;
    for (std::int64_t k = 0; k < pathway.tiles; ++k) {
      sum += call.partials[pathway.first_tile + k * pathway.tile_stride];
    }
    assign(call.per_pathway, plan.dtype, p, sum);
    loss += value(call.weights, plan.dtype, p) * sum;
  }
  assign(call.loss, plan.dtype, 0, loss);
}

void pathway_loss_backward(const PathwayPlan& plan, const LossBackward& call) {
  Workplace work(plan);
  const BackwardTile run = kBackward[static_cast<int>(plan.dtype)];
  const std::size_t size = accumulation_size(plan.dtype);
  const double grad_loss = value(call.grad_loss, plan.dtype);
  const auto tiles = static_cast<std::int64_t>(plan.tiles.size());
#pragma omp parallel for schedule(static) if (tiles > 1)
  for (std::int64_t i = 0; i < tiles; ++i) {
    const Tile& tile = plan.tiles[static_cast<std::size_t>(i)];
    const auto p = static_cast<std::size_t>(tile.pathway);
    const double weight = value(call.weights, plan.dtype, p);
    const double grad = value(call.grad_per_pathway, plan.dtype, p);
    const char* means = static_cast<const char*>(call.means);
    if (means) means += static_cast<std::size_t>(plan.pathways[p].first_mean) * size;
    run(work.geometry_of(p), tile.first_plane, tile.planes, address(call.students[p]),
        address(call.teachers[p]), const_cast<void*>(address(call.gradients[p])), means,
        weight == 0 ? 0 : weight * grad_loss + grad, work.scratch());
  }
}

}  // namespace distpro::cpu
