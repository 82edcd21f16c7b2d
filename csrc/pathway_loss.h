// The feature losses of all pathways, forward and backward. cpu:: and cuda:: do the same work; the
// CUDA one only launches on `stream` (a cudaStream_t) and never waits for it. All addresses are on
// the device of the call. "acc" below is the accumulation type of the plan's dtype.
#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"
#include "types.h"

namespace distpro {

struct Pathway {
  Shape shape;                // N, C, H, W
  Layout layout;              // of student, teacher and gradient
  std::vector<Level> levels;  // {{0, 1}} unless hcl
  std::int64_t bins;          // of all levels l > 0: the sum of l * l, at most 21
  std::int64_t means_offset;  // where its bin means start, in acc elements
};

// A pure function of shapes, so that Python can cache one per signature.
struct PathwayPlan {
  Dtype dtype;
  Distance distance;
  std::vector<Pathway> pathways;
  std::int64_t means_size;  // acc elements of all bin means
  Tiling tiling;
};

// l2 and l1 ignore planes and layouts: pass any dense map (tokens too) as planes, of shape
// {N, rest, 1, 1} or similar. In channels_last a plane is a channel of an image, numbered
// n * C + c; a tile never spans two images, and its channels are a multiple of `tile_channels`,
// except in an image's last tile.
PathwayPlan pathway_plan(Dtype dtype, Distance distance, const std::vector<Shape>& shapes,
                         const std::vector<Layout>& layouts,
                         const std::vector<std::int64_t>& teacher_of, std::int64_t tile_elements,
                         std::int64_t tile_channels);

// Bin means of student - teacher, levels in the plan's order, bins of a level row by row, are at
// means[means_offset + ...] as [N * C, bins] for planes and [N, bins, C] for channels_last.
//
// A pathway of weight 0 is not read: its loss is 0 and its means are not written.
struct LossForward {
  const std::uintptr_t* students;  // P addresses, in host memory
  const std::uintptr_t* teachers;
  const void* weights;  // acc [P]
  void* loss;           // acc []: sum of weights[p] * per_pathway[p], summed in double
  void* per_pathway;    // acc [P]
  void* means;          // acc [plan.means_size], or null: do not keep them
  double* partials;     // workspace [tiles]: each tile's contribution to per_pathway
};

// gradients[p] = coefficient[p] * d per_pathway[p] / d students[p], coefficient[p] =
// weights[p] * grad_loss + grad_per_pathway[p]. If weights[p] is 0, gradients[p] is filled with 0
// and no map is read.
struct LossBackward {
  const std::uintptr_t* students;
  const std::uintptr_t* teachers;
  const std::uintptr_t* gradients;  // P addresses to write, dtype and layout of the student
  const void* weights;              // acc [P]
  const void* grad_loss;            // acc []
  const void* grad_per_pathway;     // acc [P]
  const void* means;                // of the forward; null where plan.means_size is 0
};

namespace cpu {
const char* simd();  // the instruction set of the kernels: "baseline", "avx2" or "avx512"
void pathway_loss_forward(const PathwayPlan& plan, const LossForward& call);
void pathway_loss_backward(const PathwayPlan& plan, const LossBackward& call);
}  // namespace cpu

namespace cuda {
void pathway_loss_forward(const PathwayPlan& plan, const LossForward& call, void* stream);
void pathway_loss_backward(const PathwayPlan& plan, const LossBackward& call, void* stream);
}  // namespace cuda

}  // namespace distpro
