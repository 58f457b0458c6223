// The same work on several threads. Private to tables/.
#ifndef KEEPSET_TABLES_RUN_ON_THREADS_H_
#define KEEPSET_TABLES_RUN_ON_THREADS_H_

#include <functional>

namespace keepset::tables {

// `num_threads`, or for 0 the cores this process may use.
int ThreadCount(int num_threads);

// Calls work(0) here and work(1..n-1) on threads of their own, and returns when all have. Where no
// more threads can be had fewer calls are made, so work must take its share from a common source.
// `work` must not throw.
void RunOnThreads(int num_threads, const std::function<void(int thread)>& work);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_RUN_ON_THREADS_H_
