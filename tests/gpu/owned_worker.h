// A worker whose only memory is the server's own, in a process that tests stop in each phase.
#ifndef KEEPSET_TESTS_GPU_OWNED_WORKER_H_
#define KEEPSET_TESTS_GPU_OWNED_WORKER_H_

#include <string>

namespace keepset::gpu {

// As RunIpcWorker (ipc_worker.h), with kRegionBytes of memory that the server makes:
//
//   owned_whole    looks for zeros, compresses keys and values in it into other parts of it, wants
//                  the rows that were kept bit for bit, retires it
//   owned_mapped   stands still with the memory mapped
//   owned_calling  calls for ever
//   owned_lost     opens its session anew, which loses the memory, and stands still with it mapped
//   owned_word     the same, then retires it and says "retired"; stands still
//   owned_outlive  waits until the server is gone and another one has come, says "lost" when the
//                  memory says so, retires it and says "over: freed" when the driver has
//                  it back, or "over: ..." when the driver refuses to close the mapping of a
//                  process that is gone, as it may
int RunOwnedWorker(const std::string& address, const std::string& kind, const std::string& phase);

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_OWNED_WORKER_H_
