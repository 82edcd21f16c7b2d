// Inner products and perturbations on the CPU; partials are added up in the order of the tiles.
#include <cmath>
#include <limits>
#include <stdexcept>

#include "vectors.h"

namespace distpro::cpu {
namespace {

constexpr int kVectorBytes = 16;
#include "storage.h"

constexpr int kSums = 16;

template <typename T>
const T* at(std::uintptr_t address, const Tile& tile) {
  return reinterpret_cast<const T*>(address) + tile.first_plane;
}

// Products of two floats are exact in a double, so the sum is as good as its inputs.
template <typename T>
double dot(const T* left, const T* right, std::int64_t size) {
  double sums[kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums <= size; i += kSums) {
    for (int k = 0; k < kSums; ++k) {
      sums[k] += static_cast<double>(load(left[i + k])) * static_cast<double>(load(right[i + k]));
    }
  }
  for (; i < size; ++i) {
    sums[0] += static_cast<double>(load(left[i])) * static_cast<double>(load(right[i]));
  }
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

template <typename T>
void dots_of_tiles(const VectorPlan& plan, const std::uintptr_t* left, const std::uintptr_t* right,
                   double* partials) {
  const auto tiles = static_cast<std::int64_t>(plan.tiles.size());
#pragma omp parallel for schedule(static) if (tiles > 1)
  for (std::int64_t i = 0; i < tiles; ++i) {
    const Tile& tile = plan.tiles[static_cast<std::size_t>(i)];
    partials[i] =
        dot(at<T>(left[tile.pathway], tile), at<T>(right[tile.pathway], tile), tile.planes);
  }
}

template <typename T>
void dots(const VectorPlan& plan, const Dots& call) {
  dots_of_tiles<T>(plan, call.left, call.right, call.partials);
  std::vector<double> sums(static_cast<std::size_t>(plan.slots));
  for (std::size_t i = 0; i < plan.tiles.size(); ++i) {
    const std::int64_t slot = plan.slot_of[static_cast<std::size_t>(plan.tiles[i].pathway)];
    sums[static_cast<std::size_t>(slot)] += call.partials[i];
  }
  auto* out = static_cast<Accumulation<T>*>(call.dots);
  for (std::size_t s = 0; s < sums.size(); ++s) out[s] = static_cast<Accumulation<T>>(sums[s]);
}

template <typename T>
void perturb_as(const VectorPlan& plan, const Perturb& call) {
  dots_of_tiles<T>(plan, call.directions, call.directions, call.partials);
  double square = 0;
  for (std::size_t i = 0; i < plan.tiles.size(); ++i) square += call.partials[i];
  const double norm = std::sqrt(square);
  T epsilon = static_cast<T>(call.radius / norm);
  if (norm == 0) epsilon = 0;
  if (!std::isfinite(norm)) epsilon = std::numeric_limits<T>::quiet_NaN();
  *static_cast<T*>(call.epsilon) = epsilon;

  const auto tiles = static_cast<std::int64_t>(plan.tiles.size());
#pragma omp parallel for schedule(static) if (tiles > 1)
  for (std::int64_t i = 0; i < tiles; ++i) {
    const Tile& tile = plan.tiles[static_cast<std::size_t>(i)];
    const T* parameter = at<T>(call.parameters[tile.pathway], tile);
    const T* direction = at<T>(call.directions[tile.pathway], tile);
    T* plus = const_cast<T*>(at<T>(call.plus[tile.pathway], tile));
    T* minus = const_cast<T*>(at<T>(call.minus[tile.pathway], tile));
    for (std::int64_t k = 0; k < tile.planes; ++k) {
      const T step = epsilon * direction[k];
      plus[k] = parameter[k] + step;
      minus[k] = parameter[k] - step;
    }
  }
}

}  // namespace

void pathway_dots(const VectorPlan& plan, const Dots& call) {
  switch (plan.dtype) {
    case Dtype::float32:
      return dots<float>(plan, call);
    case Dtype::bfloat16:
      return dots<BFloat16>(plan, call);
    case Dtype::float16:
      return dots<Half>(plan, call);
    case Dtype::float64:
      return dots<double>(plan, call);
  }
}

void perturb(const VectorPlan& plan, const Perturb& call) {
  if (plan.dtype == Dtype::float32) return perturb_as<float>(plan, call);
  if (plan.dtype == Dtype::float64) return perturb_as<double>(plan, call);
  throw std::invalid_argument("perturb: float32 or float64 only");
}

}  // namespace distpro::cpu
