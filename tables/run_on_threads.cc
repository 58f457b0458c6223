#include "tables/run_on_threads.h"

#include <sched.h>

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

namespace keepset::tables {

int ThreadCount(int num_threads) {
  if (num_threads > 0) return num_threads;
  cpu_set_t cores;
  if (::sched_getaffinity(0, sizeof(cores), &cores) == 0) return std::max(1, CPU_COUNT(&cores));
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

void RunOnThreads(int num_threads, const std::function<void(int thread)>& work) {
  const int count = ThreadCount(num_threads);
  std::vector<std::thread> helpers;
  helpers.reserve(count - 1);
  for (int i = 1; i < count; ++i) {
    try {
      helpers.emplace_back([&work, i] { work(i); });
    } catch (const std::system_error&) {
      break;
    }
  }
  work(0);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace keepset::tables
