// Tiles of flat arrays, which start at element `first`. Included through simd_dispatch.h: no
// includes but simd_elements.h.
#include "simd_elements.h"

constexpr int kSums = 16;  // independent partial sums of a dot product

// Products of two floats are exact in a double, so the sum is as good as its inputs.
template <typename T>
double dot(std::uintptr_t left_array, std::uintptr_t right_array, std::int64_t first,
           std::int64_t size) {
  const T* left = reinterpret_cast<const T*>(left_array) + first;
  const T* right = reinterpret_cast<const T*>(right_array) + first;
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
void perturb_tile(const Perturb& call, std::int64_t array, std::int64_t first, std::int64_t size,
                  double epsilon) {
  const T* __restrict parameter = reinterpret_cast<const T*>(call.parameters[array]) + first;
  const T* __restrict direction = reinterpret_cast<const T*>(call.directions[array]) + first;
  T* __restrict plus = reinterpret_cast<T*>(call.plus[array]) + first;
  T* __restrict minus = reinterpret_cast<T*>(call.minus[array]) + first;
  const T factor = static_cast<T>(epsilon);
  for (std::int64_t k = 0; k < size; ++k) {
    const T step = factor * direction[k];
    plus[k] = parameter[k] + step;
    minus[k] = parameter[k] - step;
  }
}
