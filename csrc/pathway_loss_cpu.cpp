// The pathway loss on the CPU: tiles are distributed over OpenMP threads. A tile's result does not
// depend on its thread, and partials are added in the order of the tiles, so that the result is
// bitwise the same for any number of threads.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "geometry.h"
#include "pathway_loss.h"
#include "threads.h"
#include "types.h"

namespace distpro::cpu {
namespace {

using ForwardTile = double (*)(const Geometry&, std::int64_t, std::int64_t, const void*,
                               const void*, void*, void*);
using BackwardTile = void (*)(const Geometry&, std::int64_t, std::int64_t, const void*, const void*,
                              void*, const void*, double, void*);

struct Kernels {
  ForwardTile forward[4];  // by Dtype
  BackwardTile backward[4];
  const char* name;
};

#define DISTPRO_KERNELS                                                                         \
  {{forward_tile<float>, forward_tile<BFloat16>, forward_tile<Half>, forward_tile<double>},     \
   {backward_tile<float>, backward_tile<BFloat16>, backward_tile<Half>, backward_tile<double>}, \
   kName}

#define DISTPRO_KERNEL_FILE "pathway_kernels.h"
#include "simd_dispatch.h"

std::size_t accumulation_size(Dtype dtype) {
  return dtype == Dtype::float64 ? sizeof(double) : sizeof(float);
}

std::size_t element_size(Dtype dtype) {
  return dtype == Dtype::float32 || dtype == Dtype::float64 ? accumulation_size(dtype) : 2;
}

double value(const void* from, Dtype dtype, std::size_t index = 0) {
  return dtype == Dtype::float64 ? static_cast<const double*>(from)[index]
                                 : static_cast<const float*>(from)[index];
}

void* address(std::uintptr_t number) { return reinterpret_cast<void*>(number); }

// Fresh memory is mapped at its first touch, in pages of 4 KB. For 27 gradients of 132 MB together,
// forward and backward took 70-92 ms, with pages of 2 MB 58-64. This asks for the latter.
void prefer_huge_pages([[maybe_unused]] std::uintptr_t start, [[maybe_unused]] std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr std::uintptr_t kHuge = std::uintptr_t{1} << 21;
  const std::uintptr_t first = (start + kHuge - 1) / kHuge * kHuge;
  const std::uintptr_t last = (start + bytes) / kHuge * kHuge;
  if (first < last) madvise(address(first), last - first, MADV_HUGEPAGE);
#endif
}

// The geometry of each pathway, and scratch memory for each thread.
class Workspace {
 public:
  explicit Workspace(const PathwayPlan& plan) {
    std::int64_t most = 0;  // scratch elements of a thread
    for (std::size_t p = 0; p < plan.pathways.size(); ++p) {
      geometries_.push_back(geometry(plan.pathways[p], plan.distance));
      const Geometry& g = geometries_.back();
      const std::int64_t planes = plan.tiling.series[p].planes;
      const bool channels_last = g.layout == Layout::channels_last;
      most = std::max(most, channels_last ? planes * g.bins : baseline::scratch_of(g));
    }
    stride_ = static_cast<std::size_t>(most) / 8 + 2;  // a line apart: no false sharing
    scratch_.resize(stride_ * static_cast<std::size_t>(threads()));
  }

  const Geometry& geometry_of(std::size_t pathway) const { return geometries_[pathway]; }
  void* scratch() { return scratch_.data() + stride_ * static_cast<std::size_t>(thread()); }

 private:
  struct alignas(64) Line {
    double numbers[8];
  };

  std::vector<Geometry> geometries_;
  std::vector<Line> scratch_;
  std::size_t stride_;
};

// Runs each tile once. The tiles are split evenly among the threads for each teacher map, not as a
// whole: an element costs several times as much in small maps as in large ones. A thread's tiles of
// a map are contiguous, so that the pathways of a range of the map find it in this core's cache.
template <class Run>
void for_each_tile(const PathwayPlan& plan, const Run& run) {
  const std::vector<std::int64_t>& start = plan.tiling.map_starts;
#pragma omp parallel if (plan.tiling.tiles.size() > 1)
  for (std::size_t map = 0; map + 1 < start.size(); ++map) {
#pragma omp for schedule(static) nowait
    for (std::int64_t i = start[map]; i < start[map + 1]; ++i) run(i);
  }
}

}  // namespace

const char* simd() { return kernels().name; }

void pathway_loss_forward(const PathwayPlan& plan, const LossForward& call) {
  Workspace work(plan);
  const ForwardTile run = kernels().forward[static_cast<int>(plan.dtype)];
  const std::size_t size = accumulation_size(plan.dtype);
  for_each_tile(plan, [&](std::int64_t i) {
    const Tile& tile = plan.tiling.tiles[static_cast<std::size_t>(i)];
    const auto p = static_cast<std::size_t>(tile.pathway);
    double& partial = call.partials[i];
    if (value(call.weights, plan.dtype, p) == 0) {
      partial = 0;
      return;
    }
    char* means = static_cast<char*>(call.means);
    if (means) means += static_cast<std::size_t>(plan.pathways[p].means_offset) * size;
    partial = run(work.geometry_of(p), tile.first_plane, tile.planes, address(call.students[p]),
                  address(call.teachers[p]), means, work.scratch());
  });

  double loss = 0;
  for (std::size_t p = 0; p < plan.pathways.size(); ++p) {
    const TileSeries& series = plan.tiling.series[p];
    double sum = 0;
    for (std::int64_t k = 0; k < series.count; ++k) {
      sum += call.partials[series.first + k * series.stride];
    }
    assign(call.per_pathway, plan.dtype, p, sum);
    loss += value(call.weights, plan.dtype, p) * sum;
  }
  assign(call.loss, plan.dtype, 0, loss);
}

void pathway_loss_backward(const PathwayPlan& plan, const LossBackward& call) {
  Workspace work(plan);
  const BackwardTile run = kernels().backward[static_cast<int>(plan.dtype)];
  const std::size_t size = accumulation_size(plan.dtype);
  const double grad_loss = value(call.grad_loss, plan.dtype);
  for (std::size_t p = 0; p < plan.pathways.size(); ++p) {
    const auto [n, c, h, w] = plan.pathways[p].shape;
    const auto elements = static_cast<std::size_t>(n * c * h * w);
    prefer_huge_pages(call.gradients[p], elements * element_size(plan.dtype));
  }
  for_each_tile(plan, [&](std::int64_t i) {
    const Tile& tile = plan.tiling.tiles[static_cast<std::size_t>(i)];
    const auto p = static_cast<std::size_t>(tile.pathway);
    const double weight = value(call.weights, plan.dtype, p);
    const double grad = value(call.grad_per_pathway, plan.dtype, p);
    const char* means = static_cast<const char*>(call.means);
    if (means) means += static_cast<std::size_t>(plan.pathways[p].means_offset) * size;
    run(work.geometry_of(p), tile.first_plane, tile.planes, address(call.students[p]),
        address(call.teachers[p]), address(call.gradients[p]), means,
        weight == 0 ? 0 : weight * grad_loss + grad, work.scratch());
  });
}

}  // namespace distpro::cpu
