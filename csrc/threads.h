// OpenMP's threads, or one where the build has none.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace distpro {

// Of a parallel region; follows torch.set_num_threads.
inline int threads() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// The number of this one within its region.
inline int thread() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace distpro
