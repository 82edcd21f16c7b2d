// Codes that Python and the kernels share.
#pragma once

namespace distpro {

// Of the maps. Sums, losses, weights, bin means and epsilon have the accumulation type of it:
// double for float64, float for the others.
enum class Dtype : int { float32 = 0, bfloat16 = 1, float16 = 2, float64 = 3 };

enum class Distance : int { hcl = 0, l2 = 1, l1 = 2 };

// Order of a dense map in memory: planes [N, C, H, W], or channels_last [N, H, W, C].
enum class Layout : int { planes = 0, channels_last = 1 };

}  // namespace distpro
