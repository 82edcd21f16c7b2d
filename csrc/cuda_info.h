// What the CUDA runtime in this module reports about the machine. Can be called without a GPU.
#pragma once

#include <string>

namespace distpro {

struct CudaInfo {
  int runtime;         // of the runtime linked in, e.g. 13000 for 13.0
  int driver;          // the newest CUDA the installed driver supports; 0 without a driver
  int devices;         // 0 without one
  std::string status;  // "no error", or why there is no device
};

CudaInfo cuda_info();

// The architecture of the machine code that `device` runs (90 for sm_90), or of the PTX it was
// compiled from. Throws std::runtime_error if this build has neither for it.
int kernel_arch(int device);

}  // namespace distpro
