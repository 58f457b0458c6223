// Ids that tie an error a client saw to the log line with its cause. Thread-safe.
#ifndef KEEPSET_SERVICE_RPC_CORRELATION_IDS_H_
#define KEEPSET_SERVICE_RPC_CORRELATION_IDS_H_

#include <atomic>
#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"

namespace keepset::service {

class CorrelationIds {
 public:
  // `seed` is random, so that ids of two runs of a server do not meet in one log.
  explicit CorrelationIds(uint64_t seed) : next_(seed) {}

  std::string Next() {
    // The finaliser of splitmix64 spreads a counter over all bits.
    uint64_t x = next_.fetch_add(0x9e3779b97f4a7c15, std::memory_order_relaxed);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return absl::StrCat(absl::Hex(x ^ (x >> 31), absl::kZeroPad16));
  }

 private:
  std::atomic<uint64_t> next_;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_CORRELATION_IDS_H_
