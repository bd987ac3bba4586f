// How many threads the CPU backend runs on, and with what.
#pragma once

// The thread sanitizer does not see libgomp's barriers and would report every loop; plain threads show
// it the same tasks.
#if defined(_OPENMP) && !defined(__SANITIZE_THREAD__)
#define FSATTN_USE_OPENMP
#include <omp.h>
#else
#include <algorithm>
#include <cstdlib>
#include <thread>
#endif

namespace fsattn {

// Threads that a parallel loop may use here. Without OpenMP: OMP_NUM_THREADS if it is set to a positive
// number, else the cores of the machine.
inline int num_cpu_threads() {
#ifdef FSATTN_USE_OPENMP
  return omp_get_max_threads();
#else
  const char* wish = std::getenv("OMP_NUM_THREADS");
  const int wanted = wish == nullptr ? 0 : std::atoi(wish);
  return wanted > 0 ? wanted : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
#endif
}

}  // namespace fsattn
