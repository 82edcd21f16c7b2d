// As much of CUDA as csrc's kernels use, on the host: every thread of a block is a thread here,
// blocks run one after another. Where there is no GPU this shows whether indices, barriers and sums
// are right; under -fsanitize=thread also whether shared memory is used without a race.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define DISTPRO_EMULATED

struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct Index {
  unsigned int x;
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace emulation {

// More threads than cores meet here many times: giving the core away beats sleeping.
class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}
  void wait() {
    const long round = round_.load();
    if (++arrived_ == threads_) {
      arrived_ = 0;
      ++round_;
    } else {
      while (round_.load() == round) std::this_thread::yield();
    }
  }

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<long> round_{0};
};

struct Warp {
  Barrier barrier{32};
  double lanes[2][32];  // used in turn, so that one barrier a shuffle is enough
};

struct Block {
  explicit Block(int threads) : barrier(threads), end(threads), warps(threads / 32) {}
  Barrier barrier;  // of __syncthreads
  Barrier end;      // between blocks, which share the static variables
  std::vector<Warp> warps;
};

inline thread_local Index thread_index, block_index;
inline thread_local Block* block = nullptr;
inline thread_local int shuffles;
inline thread_local long barriers;

template <typename Kernel, typename... Arguments>
void run(Kernel kernel, int blocks, int threads, const Arguments&... arguments) {
  Block shared(threads);
  std::vector<long> met(threads);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      block = &shared;
      thread_index.x = static_cast<unsigned int>(t);
      for (int b = 0; b < blocks; ++b) {
        block_index.x = static_cast<unsigned int>(b);
        kernel(arguments...);
        shared.end.wait();
      }
      met[t] = barriers;
    });
  }
  for (std::thread& thread : pool) thread.join();
  for (const long count : met) {
    if (count == met[0]) continue;
    std::fputs("threads of a block met different numbers of barriers\n", stderr);
    std::abort();
  }
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index

inline void __syncthreads() {
  ++emulation::barriers;
  emulation::block->barrier.wait();
}

inline double __shfl_down_sync(unsigned int, double x, int distance) {
  emulation::Warp& warp = emulation::block->warps[threadIdx.x / 32];
  double (&lanes)[32] = warp.lanes[emulation::shuffles++ % 2];
  const int lane = static_cast<int>(threadIdx.x % 32);
  lanes[lane] = x;
  warp.barrier.wait();
  return lane + distance < 32 ? lanes[lane + distance] : x;
}

template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, T x) {
  *to = x;
}
inline float __uint_as_float(unsigned int bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
using std::fabs;

namespace distpro::cuda {

template <typename... Parameters, typename... Arguments>
void launch(const char*, void (*kernel)(Parameters...), int blocks, int threads, void*,
            const Arguments&... arguments) {
  emulation::run(kernel, blocks, threads, arguments...);
}

}  // namespace distpro::cuda
