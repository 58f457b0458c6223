// What the process uses of the limits that end a server without a word: descriptors, memory
// mappings, locked memory.
#ifndef KEEPSET_SERVICE_METRICS_PROCESS_USAGE_H_
#define KEEPSET_SERVICE_METRICS_PROCESS_USAGE_H_

namespace keepset::service {

// Infinity: no limit. NaN: this system does not say.
struct ProcessUsage {
  double open_fds = 0;
  double max_fds = 0;
  double memory_mappings = 0;
  double max_memory_mappings = 0;
  double locked_bytes = 0;
  double max_locked_bytes = 0;
  double resident_bytes = 0;
};

// Reads /proc/self and the soft limits; about a microsecond per open descriptor and mapping, so not
// on a path where operations wait. Thread-safe.
ProcessUsage ReadProcessUsage();

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_METRICS_PROCESS_USAGE_H_
