// Sets the number of threads of the CPU backend for a while.
#pragma once
#include <cstdlib>
#include <string>

#include "base/threads.h"

namespace fsattn::test {

inline void set_num_threads(int threads) {
#ifdef FSATTN_USE_OPENMP
  omp_set_num_threads(threads);
#else
  setenv("OMP_NUM_THREADS", std::to_string(threads).c_str(), 1);
#endif
}

class ThreadScope {
 public:
  explicit ThreadScope(int threads) : before_(num_cpu_threads()) { set_num_threads(threads); }
  ~ThreadScope() { set_num_threads(before_); }
  ThreadScope(const ThreadScope&) = delete;
  ThreadScope& operator=(const ThreadScope&) = delete;

 private:
  int before_;
};

}  // namespace fsattn::test
