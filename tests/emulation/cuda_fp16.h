#pragma once

#include "cuda_runtime.h"

struct __half {
  _Float16 number;  // g++ 12 and up, clang 15 and up
};
inline float __half2float(__half x) { return x.number; }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }
