#include <cuda_runtime.h>

#include <stdexcept>

#include "cuda_info.h"

namespace distpro {
namespace {

// Never launched: its architectures in the module are those of all kernels.
__global__ void probe_kernel() {}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace

CudaInfo cuda_info() {
  CudaInfo info{};
  cudaRuntimeGetVersion(&info.runtime);
  cudaDriverGetVersion(&info.driver);
  const cudaError_t error = cudaGetDeviceCount(&info.devices);
  if (error != cudaSuccess) info.devices = 0;
  info.status = cudaGetErrorString(error);
  cudaGetLastError();  // a missing device must not surface as the next call's error
  return info;
}

int kernel_arch(int device) {
  int before = 0;
  check(cudaGetDevice(&before));
  check(cudaSetDevice(device));
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  cudaGetLastError();  // a device without kernels must not surface as the next error
  check(cudaSetDevice(before));
  check(error);
  return attributes.binaryVersion;
}

}  // namespace distpro
