// Shared by all kernels: finding a block's tile, sums in a fixed order, launches.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "elements.cuh"
#include "plan.h"

namespace distpro::cuda {

// Where the tiles of one item (a pathway, an array) are among the blocks of a launch. The items of
// a group have equally many tiles, interleaved: tile 0 of each, then tile 1 of each, ...
struct Placement {
  int first_block;    // of the group
  int group;          // index of its first item
  int members;        // items in the group
  int first_partial;  // of the item: its tiles' partials follow one another from there
};

struct TileIndex {
  int item;
  int tile;
};

template <typename Item>
__host__ __device__ inline TileIndex tile_of_block(const Item* items, int count, int block) {
  int low = 0, high = count;  // the item sought, or one of its group, is in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (items[middle].placement.first_block <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const Placement& placement = items[low].placement;
  const int local = block - placement.first_block;
  return {placement.group + local % placement.members, local / placement.members};
}

// One launch: its items, by index in the plan, and the placement of each (first_partial unset).
struct LaunchPlan {
  std::vector<int> items;
  std::vector<Placement> placements;
  int blocks = 0;
};

// Splits the items into launches of at most `capacity`, in the order of the plan's tiles.
inline std::vector<LaunchPlan> plan_launches(const std::vector<TileSeries>& series, int capacity) {
  std::vector<int> order(series.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int a, int b) { return series[a].first < series[b].first; });
  std::vector<LaunchPlan> launches;
  const TileSeries* previous = nullptr;
  for (const int item : order) {
    const TileSeries& own = series[item];
    if (launches.empty() || static_cast<int>(launches.back().items.size()) == capacity) {
      launches.emplace_back();
      previous = nullptr;
    }
    LaunchPlan& last = launches.back();
    const int index = static_cast<int>(last.items.size());
    const bool joins = previous && previous->count == own.count && previous->stride == own.stride &&
                       previous->first + 1 == own.first &&
                       last.placements.back().members < own.stride;
    const int group = joins ? last.placements.back().group : index;
    const int first_block = joins ? last.placements.back().first_block : last.blocks;
    last.items.push_back(item);
    last.placements.push_back({first_block, group, 0, 0});
    for (int i = group; i <= index; ++i) last.placements[i].members = index - group + 1;
    last.blocks += static_cast<int>(own.count);
    previous = &own;
  }
  return launches;
}

// Where the partials of each item start if all follow one another, then how many there are.
inline std::vector<int> first_partials(const std::vector<TileSeries>& series) {
  std::vector<int> first{0};
  for (const TileSeries& s : series) first.push_back(first.back() + static_cast<int>(s.count));
  return first;
}

__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    x += __shfl_down_sync(0xffffffffu, x, distance);
  }
  return x;
}

// Thread 0 gets the sum over the block's kBlock threads, always added in the same order.
template <int kBlock>
__device__ inline double block_sum(double x) {
  __shared__ double sums[kBlock / 32];
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x >= 32) return 0;
  return warp_sum(threadIdx.x < kBlock / 32 ? sums[threadIdx.x] : 0.0);
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it: the next call must not report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

#ifndef DISTPRO_EMULATED
template <typename... Parameters, typename... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), int blocks, int threads, void* stream,
            const Arguments&... arguments) {
  if (blocks == 0) return;
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), what);
}
#endif

// -- the second stage: sums of the tiles' partials -------------------

// One block reads them all; four times the usual threads keep more loads in flight.
constexpr int kFinishThreads = 4 * kThreads;
constexpr int kMaxSums = 1024;

struct Sums {
  const double* partials;
  void* sums;           // Real [count]
  const void* weights;  // Real [count], or null; where 0, the sum is 0 and no partials are read
  void* total;          // Real [], or null: sum of weights * sums
  bool onto_total;      // add to the present value of `total`
  int count;
  int first[kMaxSums + 1];  // partials [first[i], first[i + 1]) make sum i
};

template <typename Real>
__global__ void __launch_bounds__(kFinishThreads) sums_kernel(const __grid_constant__ Sums call) {
  constexpr int kWarps = kFinishThreads / 32;
  constexpr int kTogether = 8;  // sums in parallel, each by warps of its own
  static_assert(kWarps >= kTogether);
  __shared__ double by_warp[kWarps];
  __shared__ double weighted[kTogether];
  const auto* weights = static_cast<const Real*>(call.weights);
  auto* sums = static_cast<Real*>(call.sums);
  const int together = max(1, min(kTogether, call.count));
  const int each = kWarps / together;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int mine = warp / each;
  const int reader = static_cast<int>(threadIdx.x) - mine * each * 32;
  double total = 0;
  for (int base = 0; base < call.count; base += together) {
    const int left = min(together, call.count - base);
    double part = 0;
    if (mine < left && (!weights || weights[base + mine] != 0)) {
      const int end = call.first[base + mine + 1];
#pragma unroll 4
      for (int i = call.first[base + mine] + reader; i < end; i += 32 * each) {
        part += call.partials[i];
      }
    }
    part = warp_sum(part);
    if (threadIdx.x % 32 == 0) by_warp[warp] = part;
    __syncthreads();
    if (const int j = static_cast<int>(threadIdx.x); j < left) {
      double sum = 0;
      for (int k = 0; k < each; ++k) sum += by_warp[j * each + k];
      const Real rounded = static_cast<Real>(sum);
      sums[base + j] = rounded;
      weighted[j] = weights && weights[base + j] != 0
                        ? static_cast<double>(weights[base + j]) * rounded
                        : 0.0;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int j = 0; j < left; ++j) total += weighted[j];
    }
  }
  if (threadIdx.x == 0 && call.total) {
    auto* out = static_cast<Real*>(call.total);
    *out = static_cast<Real>(call.onto_total ? *out + total : total);
  }
}

// sums[i] = sum of partials [first[i], first[i + 1]). `total` is written even if there are no sums.
template <typename Real>
void launch_sums(const std::vector<int>& first, const double* partials, void* sums,
                 const void* weights, void* total, void* stream) {
  const int count = static_cast<int>(first.size()) - 1;
  int done = 0;
  do {
    Sums call{partials,
              static_cast<Real*>(sums) + done,
              weights ? static_cast<const Real*>(weights) + done : nullptr,
              total,
              done > 0,
              std::min(kMaxSums, count - done),
              {}};
    std::copy_n(first.begin() + done, call.count + 1, call.first);
    launch("sums of tiles", sums_kernel<Real>, 1, kFinishThreads, stream, call);
    done += call.count;
  } while (done < count);
}

}  // namespace distpro::cuda
