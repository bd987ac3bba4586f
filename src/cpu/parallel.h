// Loops over independent tasks. A task owns what it writes and does not depend on the thread that runs
// it, so that results are the same for any number of threads and either schedule.
#pragma once
#include <algorithm>
#include <cstdint>

#include "base/threads.h"

#ifndef FSATTN_USE_OPENMP
#include <atomic>
#include <thread>
#include <vector>
#endif

namespace fsattn::cpu {

// Even for tasks of equal cost, dynamic for tasks whose cost varies.
enum class Schedule : int { kStatic, kDynamic };

// Calls f(task, thread_idx) for every task in [0, num_tasks) on at most max_threads threads;
// 0 <= thread_idx < max_threads. f must not throw.
template <class F>
void parallel_for(int64_t num_tasks, int max_threads, [[maybe_unused]] Schedule schedule,
                  const F& f) {
  const int threads = static_cast<int>(std::clamp<int64_t>(num_tasks, 1, max_threads));
  if (threads == 1) {
    for (int64_t task = 0; task < num_tasks; ++task) f(task, 0);
    return;
  }
#ifdef FSATTN_USE_OPENMP
  if (schedule == Schedule::kStatic) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t task = 0; task < num_tasks; ++task) f(task, omp_get_thread_num());
  } else {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t task = 0; task < num_tasks; ++task) f(task, omp_get_thread_num());
  }
#else
  std::atomic<int64_t> next{0};
  std::vector<std::thread> team;
  for (int thread_idx = 0; thread_idx < threads; ++thread_idx) {
    team.emplace_back([&, thread_idx] {
      for (int64_t task = next++; task < num_tasks; task = next++) f(task, thread_idx);
    });
  }
  for (std::thread& thread : team) thread.join();
#endif
}

// Calls f(task) on all threads.
template <class F>
void parallel_for(int64_t num_tasks, Schedule schedule, const F& f) {
  parallel_for(num_tasks, num_cpu_threads(), schedule, [&f](int64_t task, int) { f(task); });
}

}  // namespace fsattn::cpu
