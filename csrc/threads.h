// OpenMP's threads, or a single one in builds without OpenMP.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace distpro {

// Number of threads of a parallel region; follows torch.set_num_threads.
inline int threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Index of this thread within its region.
inline int thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace distpro
