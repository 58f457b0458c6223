// A worker with device memory in a process of its own, which tests stop in each phase of its life.
#ifndef KEEPSET_TESTS_GPU_IPC_WORKER_H_
#define KEEPSET_TESTS_GPU_IPC_WORKER_H_

#include <cstdint>
#include <string>

namespace keepset::gpu {

inline constexpr int64_t kRegionBytes = int64_t{256} << 20;
// Contexts and pools of a driver move by some tens of MiB.
inline constexpr int64_t kSlackBytes = int64_t{64} << 20;
inline constexpr int64_t kSizedBytes = 512;
inline constexpr unsigned char kSizedPattern = 0x51;

// Runs to its end, or until it is killed; the exit code. Memory of `kind` (ipc_driver.h), a server
// at `address`. Says "ready" on stdout when it is in its phase, "failed: ..." before it ends
// with 1.
//
//   whole        does everything once and ends
//   exported     stands still with memory that is exported and not registered
//   registered   stands still with a registered region
//   compressed   stands still after an operation
//   compressing  calls for ever
//   retiring     registers, calls and retires at once, for ever
//   outlive      waits until the server is gone, frees its memory and says "freed" when the driver
//                has it back
//   outlive_call the same with calls under way when the server goes
//   reopening    calls until the server goes, then says "alone", opens its session again at the
//                server that comes after it, calls, and says "again"
//   handle       says "handle HEX BYTES UUID GENERATION" of a cuda_ipc export, and stands still
//   freed_handle the same, and frees the memory before
//   sized_BYTES  says "refused" or "exported" of a plain allocation of that size, then of it and of
//                a second one "handle ..." as the driver gives it, kSizedBytes of kSizedPattern + 0
//                and + 1 at their beginnings, and stands still
int RunIpcWorker(const std::string& address, const std::string& kind, const std::string& phase);

}  // namespace keepset::gpu

#endif  // KEEPSET_TESTS_GPU_IPC_WORKER_H_
