// Converting elements between memory and arithmetic, and walking runs of them in 16-byte accesses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "types.h"

namespace distpro::cuda {

#ifndef DISTPRO_THREADS  // per block; an emulation on the host has fewer
#define DISTPRO_THREADS 256
#endif
constexpr int kThreads = DISTPRO_THREADS;

// The type in which elements of type T are accumulated.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <typename T>
__device__ inline T narrow(Acc<T> x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

template <typename T>
constexpr int kWidth = 16 / sizeof(T);  // elements of the widest access

template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
  T at[V];
};

// V elements as loaded. Sixteen bytes stay in four registers until they are widened; as elements,
// eight halves would take eight.
template <typename T, int V>
using Raw = std::conditional_t<V * sizeof(T) == 16, uint4, Pack<T, V>>;

template <int V, typename T>
__device__ inline Raw<T, V> load(const T* from) {
  return *reinterpret_cast<const Raw<T, V>*>(from);
}

// For data that is read once: it is evicted first, so that data that is read again stays cached.
template <int V, typename T>
__device__ inline Raw<T, V> load_once(const T* from) {
  if constexpr (V * sizeof(T) == 16) {
    return __ldcs(reinterpret_cast<const uint4*>(from));
  } else {
    return load<V>(from);
  }
}

template <typename T, int V>
__device__ inline void widen(const Raw<T, V>& raw, Acc<T> (&x)[V]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16> && V == 8) {  // upper halves of floats
    const unsigned int words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      x[2 * j] = __uint_as_float(words[j] << 16);
      x[2 * j + 1] = __uint_as_float(words[j] & 0xffff0000u);
    }
  } else {
    Pack<T, V> pack;
    memcpy(&pack, &raw, sizeof(raw));
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = widen(pack.at[j]);
  }
}

template <typename T, int V>
__device__ inline void store_once(T* to, const Pack<T, V>& pack) {
  if constexpr (V * sizeof(T) == 16) {
    uint4 raw;
    memcpy(&raw, &pack, sizeof(raw));
    __stcs(reinterpret_cast<uint4*>(to), raw);
  } else {
    *reinterpret_cast<Pack<T, V>*>(to) = pack;
  }
}

template <typename T, int V>
__device__ inline void store_narrowed(T* to, const Acc<T> (&x)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int j = 0; j < V; ++j) pack.at[j] = narrow<T>(x[j]);
  store_once<T, V>(to, pack);
}

// Elements at origin + row * pitch + column; a single row if they are contiguous.
struct Run {
  std::int64_t origin;
  int rows;
  int columns;
  std::int64_t pitch;
};

template <typename... Pointers>
__host__ __device__ inline bool aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<std::uintptr_t>(pointers) | ...) % 16) == 0;
}

// Whether groups of `width` elements start on 16-byte boundaries in every row if the run does.
__host__ __device__ inline bool fits_width(const Run& run, int width) {
  return run.rows == 1 || (run.pitch % width == 0 && run.columns % width == 0);
}

template <int V>
using Lanes = std::integral_constant<int, V>;

// The block's threads share a run of N arrays, V elements at a time, and call for each group
// use(Lanes<V>, row, column, offset, x) with its elements widened, x[N][V]. A thread has kBatch
// loads from every array in flight before it uses the first; four instead of two would take the
// kernels with bins past 64 registers.
template <int V, int N, typename T, typename Use>
__device__ inline void walk(const T* const (&arrays)[N], const Run& run, Use&& use) {
  constexpr int kBatch = 2;
  const int lanes = run.columns / V;
  const int items = run.rows * lanes;
  for (int first = threadIdx.x; first < items; first += kBatch * kThreads) {
    Raw<T, V> raw[kBatch][N];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int item = first + u * kThreads;
      if (item >= items) break;
      const int row = run.rows == 1 ? 0 : item / lanes;
      const std::int64_t offset = run.origin + row * run.pitch + (item - row * lanes) * V;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        // Only the last array is read by other blocks too.
        raw[u][n] = n + 1 < N ? load_once<V>(arrays[n] + offset) : load<V>(arrays[n] + offset);
      }
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int item = first + u * kThreads;
      if (item >= items) break;
      const int row = run.rows == 1 ? 0 : item / lanes;
      const int column = (item - row * lanes) * V;
      Acc<T> x[N][V];
#pragma unroll
      for (int n = 0; n < N; ++n) widen<T, V>(raw[u][n], x[n]);
      use(Lanes<V>{}, row, column, run.origin + row * run.pitch + column, x);
    }
  }
}

// Walks the whole run, 16 bytes at a time if `wide`, and the rest of a single row one by one.
template <int N, typename T, typename Use>
__device__ inline void walk_all(const T* const (&arrays)[N], const Run& run, bool wide, Use&& use) {
  int done = 0;
  if (wide) {
    walk<kWidth<T>>(arrays, run, use);
    done = run.columns / kWidth<T> * kWidth<T>;
  }
  if (done == run.columns) return;
  const Run rest{run.origin + done, run.rows, run.columns - done, run.pitch};
  walk<1>(arrays, rest, [&](auto lanes, int row, int column, std::int64_t offset, auto& x) {
    use(lanes, row, done + column, offset, x);
  });
}

// Calls visit with a null pointer of the element type.
template <typename Visit>
void with_type(Dtype dtype, Visit&& visit) {
  switch (dtype) {
    case Dtype::float32:
      return visit(static_cast<float*>(nullptr));
    case Dtype::bfloat16:
      return visit(static_cast<__nv_bfloat16*>(nullptr));
    case Dtype::float16:
      return visit(static_cast<__half*>(nullptr));
    case Dtype::float64:
      return visit(static_cast<double*>(nullptr));
  }
  throw std::invalid_argument("unknown dtype code");
}

}  // namespace distpro::cuda
