// Operations on lists of flat arrays: inner products, and the two sides of a perturbation. cpu::
// and cuda:: do the same work, as in pathway_loss.h.
#pragma once

#include <cstdint>
#include <vector>

#include "plan.h"
#include "types.h"

namespace distpro {

// A pure function of sizes. An array is tiled like a pathway whose planes are its elements.
struct VectorPlan {
  Dtype dtype;
  std::vector<std::int64_t> sizes;
  std::vector<std::int64_t> slot_of;  // dots: which of `slots` sums an array adds to; else empty
  std::int64_t slots;
  Tiling tiling;
};

// right_of: arrays with the same number share a right side, and their tiles are interleaved.
VectorPlan dots_plan(Dtype dtype, const std::vector<std::int64_t>& sizes,
                     const std::vector<std::int64_t>& right_of,
                     const std::vector<std::int64_t>& slot_of, std::int64_t slots,
                     std::int64_t tile_elements);
VectorPlan perturb_plan(Dtype dtype, const std::vector<std::int64_t>& sizes,
                        std::int64_t tile_elements);

// dots[slot] = sum over its arrays of <left, right>.
struct Dots {
  const std::uintptr_t* left;  // one address per array, in host memory
  const std::uintptr_t* right;
  void* dots;        // acc [slots]
  double* partials;  // workspace [tiles]
};

// plus = parameter + epsilon * direction, minus = parameter - epsilon * direction, with epsilon =
// radius / norm of all directions together; 0 where the norm is 0, NaN where it is not finite.
// float32 and float64 only. The norm is summed in double.
struct Perturb {
  const std::uintptr_t* parameters;  // one address per array, in host memory
  const std::uintptr_t* directions;
  const std::uintptr_t* plus;  // to write
  const std::uintptr_t* minus;
  double radius;
  void* epsilon;     // acc []
  double* partials;  // workspace [tiles]
};

namespace cpu {
void pathway_dots(const VectorPlan& plan, const Dots& call);
void perturb(const VectorPlan& plan, const Perturb& call);
}  // namespace cpu

namespace cuda {
void pathway_dots(const VectorPlan& plan, const Dots& call, void* stream);
void perturb(const VectorPlan& plan, const Perturb& call, void* stream);
}  // namespace cuda

}  // namespace distpro
