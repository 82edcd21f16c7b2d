// Codes that Python and the kernels share.
#pragma once

#include <cstddef>

namespace distpro {

// Type of the maps. Sums, losses, weights, bin means and epsilon have its accumulation type: double
// for float64, float for the others.
enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

enum class Distance : int { hcl = 0, l2 = 1, l1 = 2 };

// Order of a dense map in memory: planes [N, C, H, W], or channels_last [N, H, W, C].
enum class Layout : int { planes = 0, channels_last = 1 };

// Writes x as the accumulation type of `dtype`.
inline void assign(void* to, Dtype dtype, std::size_t index, double x) {
  if (dtype == Dtype::float64) {
    static_cast<double*>(to)[index] = x;
  } else {
    static_cast<float*>(to)[index] = static_cast<float>(x);
  }
}

}  // namespace distpro
