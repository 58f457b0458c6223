// Reading files of calibration records in parallel, in bounded memory and in order.
#ifndef KEEPSET_TABLES_CALIBRATION_RECORDS_H_
#define KEEPSET_TABLES_CALIBRATION_RECORDS_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "tables/calibration_record.h"

namespace keepset::tables {

inline constexpr int64_t kMaxRecordLineBytes = 1 << 20;

// What is kept of a record once its line is gone.
struct RecordRow {
  uint64_t identity = 0;
  double reward = 0;
  double entropy = 0;
  double ppl = 0;
  int64_t line = 0;  // counted from 1 within the chunk
  uint32_t budget = 0;
  uint16_t layer = 0;
  uint16_t head = 0;
  uint16_t policy = 0;  // index into RecordChunk::policies
  RecordKind kind = RecordKind::kHead;
  HeadUnit head_unit = HeadUnit::kQueryHead;
  uint8_t action = 0;
};

struct BadLine {
  int64_t line = 0;  // counted from 1 within the chunk
  std::string message;
};

// Whole lines of one file.
struct RecordChunk {
  absl::string_view file;
  int64_t lines_before = 0;  // lines of the same file before this chunk
  std::vector<RecordRow> rows;
  std::vector<std::string> policies;  // paired_policy values of the rows; "" for none
  std::vector<BadLine> bad_lines;
};

struct RecordReadOptions {
  RecordRules rules;
  int num_threads = 0;  // 0: all cores this process may use
  // Bytes read between two commits; the memory in use is a small multiple of it per thread.
  int64_t chunk_bytes = 4 << 20;
};

// Called with bytes read so far and bytes in all files; from any of the reading threads, one call
// at a time.
using RecordProgress = std::function<void(int64_t bytes_done, int64_t bytes_total)>;
// One call at a time, in the order of the files and their lines whatever the number of threads.
using RecordCommit = std::function<absl::Status(const RecordChunk& chunk)>;

// "sha256:<hex>" of the files' bytes, one after the other. Blank lines are skipped; a last line
// without an end is accepted when it is whole. NotFound and PermissionDenied for a file,
// InvalidArgument for a line beyond kMaxRecordLineBytes, otherwise the first error of `commit`.
absl::StatusOr<std::string> ReadCalibrationRecords(const std::vector<std::string>& paths,
                                                   const RecordReadOptions& options,
                                                   const RecordCommit& commit,
                                                   const RecordProgress& progress);

// The lines of `text`, whole ones except perhaps the last.
RecordChunk ParseRecordLines(absl::string_view text, const RecordRules& rules);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_CALIBRATION_RECORDS_H_
