// Compiles the same kernels once per instruction set. Included inside a namespace that declares
// `Kernels` (a struct of function pointers), DISTPRO_KERNEL_FILE and DISTPRO_KERNELS (the struct's
// initializer from that file), after <cstdlib> and <cstring>: no includes of its own. The file sees
// kVectorBytes and must define nothing that the linker could merge across instruction sets.

namespace baseline {
constexpr int kVectorBytes = 16;  // SSE2, NEON
constexpr const char* kName = "baseline";
#include DISTPRO_KERNEL_FILE
constexpr Kernels kKernels = DISTPRO_KERNELS;
}  // namespace baseline

// clang has no such pragma; its builds have the baseline only.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
constexpr int kVectorBytes = 32;
constexpr const char* kName = "avx2";
#include DISTPRO_KERNEL_FILE
constexpr Kernels kKernels = DISTPRO_KERNELS;
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
constexpr int kVectorBytes = 64;
constexpr const char* kName = "avx512";
#define DISTPRO_AVX512
#include DISTPRO_KERNEL_FILE
#undef DISTPRO_AVX512
constexpr Kernels kKernels = DISTPRO_KERNELS;
}  // namespace avx512
#pragma GCC pop_options

// The best that this processor supports; DISTPRO_SIMD=baseline or avx2 asks for less, for tests.
const Kernels& chosen() {
  const char* wanted = std::getenv("DISTPRO_SIMD");
  if (wanted && std::strcmp(wanted, "baseline") == 0) return baseline::kKernels;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return baseline::kKernels;
  if (wanted && std::strcmp(wanted, "avx2") == 0) return avx2::kKernels;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return avx2::kKernels;
  }
  return avx512::kKernels;
}

const Kernels& kernels() {
  static const Kernels& best = chosen();
  return best;
}
#else
const Kernels& kernels() { return baseline::kKernels; }
#endif
