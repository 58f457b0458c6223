#include "tables/calibration_records.h"

#include <fcntl.h>
#include <openssl/evp.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/status_macros.h"
#include "tables/file_bytes.h"
#include "tables/run_on_threads.h"

namespace keepset::tables {
namespace {

bool IsBlank(absl::string_view line) {
  return std::all_of(line.begin(), line.end(),
                     [](char c) { return c == ' ' || c == '\t' || c == '\r'; });
}

// nullopt when a chunk names more policies than a row can number.
std::optional<uint16_t> PolicyIndex(absl::string_view policy, RecordChunk& chunk) {
  // Records of one rollout stand together: the last name is nearly always the one.
  for (std::size_t i = chunk.policies.size(); i-- > 0;) {
    if (chunk.policies[i] == policy) return static_cast<uint16_t>(i);
  }
  if (chunk.policies.size() > std::numeric_limits<uint16_t>::max()) return std::nullopt;
  chunk.policies.emplace_back(policy);
  return static_cast<uint16_t>(chunk.policies.size() - 1);
}

absl::StatusOr<RecordRow> RowOf(absl::string_view line, const RecordRules& rules,
                                std::string& scratch, RecordChunk& chunk) {
  KEEPSET_ASSIGN_OR_RETURN(const CalibrationRecord record,
                           ParseCalibrationRecord(line, rules, scratch));
  const std::optional<uint16_t> policy = PolicyIndex(record.paired_policy, chunk);
  if (!policy.has_value()) {
    return absl::InvalidArgumentError("paired_policy: too many different values near this line");
  }
  RecordRow row;
  row.identity = RecordIdentity(record);
  row.reward = record.reward;
  row.entropy = record.entropy;
  row.ppl = record.ppl;
  row.budget = static_cast<uint32_t>(record.budget);
  row.layer = static_cast<uint16_t>(record.layer);
  row.head = static_cast<uint16_t>(record.head);
  row.policy = *policy;
  row.kind = record.kind;
  row.head_unit = record.head_unit;
  row.action = static_cast<uint8_t>(record.action);
  return row;
}

struct TextBlock {
  int64_t sequence = 0;
  absl::string_view file;
  int64_t lines_before = 0;
  std::string text;  // ends with a newline, except at the end of a file
};

// The files' bytes as blocks of whole lines, hashed on the way. Not thread-safe.
class BlockSource {
 public:
  BlockSource(const std::vector<std::string>& paths, int64_t block_bytes)
      : paths_(paths), block_bytes_(block_bytes), hash_(EVP_MD_CTX_new(), EVP_MD_CTX_free) {}
  ~BlockSource() { CloseFile(); }
  BlockSource(const BlockSource&) = delete;
  BlockSource& operator=(const BlockSource&) = delete;

  absl::Status Start() {
    if (hash_ == nullptr || EVP_DigestInit_ex(hash_.get(), EVP_sha256(), nullptr) != 1) {
      return absl::InternalError("sha256 is not available");
    }
    for (const std::string& path : paths_) {
      struct stat info;
      if (::stat(path.c_str(), &info) != 0) return FileError(errno, "read", path);
      if (!S_ISREG(info.st_mode)) {
        return absl::InvalidArgumentError(absl::StrCat(path, ": want a regular file"));
      }
      bytes_total_ += info.st_size;
    }
    return absl::OkStatus();
  }

  // False when there is no more.
  absl::StatusOr<bool> Next(TextBlock& block) {
    while (true) {
      if (fd_ < 0) {
        if (path_index_ == paths_.size()) return false;
        KEEPSET_RETURN_IF_ERROR(OpenFile());
      }
      KEEPSET_RETURN_IF_ERROR(Fill());
      const bool at_end = end_of_file_;
      const std::size_t newline = pending_.rfind('\n');
      if (!at_end && newline == std::string::npos) {
        return absl::InvalidArgumentError(
            absl::StrCat(paths_[path_index_], ": line ", lines_before_ + 1, ": longer than ",
                         kMaxRecordLineBytes, " bytes, want one record per line"));
      }
      block.sequence = sequence_;
      block.file = paths_[path_index_];
      block.lines_before = lines_before_;
      const std::size_t taken = at_end ? pending_.size() : newline + 1;
      block.text.assign(pending_, 0, taken);
      pending_.erase(0, taken);
      lines_before_ += std::count(block.text.begin(), block.text.end(), '\n');
      if (at_end) {
        CloseFile();
        ++path_index_;
      }
      if (block.text.empty()) continue;
      ++sequence_;
      return true;
    }
  }

  absl::StatusOr<std::string> Digest() {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned int size = 0;
    if (EVP_DigestFinal_ex(hash_.get(), digest, &size) != 1) {
      return absl::InternalError("sha256 failed");
    }
    return absl::StrCat("sha256:", absl::BytesToHexString(absl::string_view(
                                       reinterpret_cast<const char*>(digest), size)));
  }

  int64_t bytes_done() const { return bytes_done_; }
  int64_t bytes_total() const { return bytes_total_; }

 private:
  absl::Status OpenFile() {
    fd_ = ::open(paths_[path_index_].c_str(), O_RDONLY | O_CLOEXEC);
    if (fd_ < 0) return FileError(errno, "read", paths_[path_index_]);
    lines_before_ = 0;
    end_of_file_ = false;
    return absl::OkStatus();
  }

  void CloseFile() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

  // Reads until a block and a whole line are there, or the file ends.
  absl::Status Fill() {
    const std::size_t want = std::max<std::size_t>(block_bytes_, 1);
    while (!end_of_file_ && (pending_.size() < want || pending_.find('\n') == std::string::npos)) {
      if (pending_.size() > want + kMaxRecordLineBytes) break;
      const std::size_t before = pending_.size();
      const std::size_t missing = before < want ? want - before : want;
      pending_.resize(before + missing);
      const ssize_t n = ::read(fd_, pending_.data() + before, missing);
      pending_.resize(before + std::max<ssize_t>(n, 0));
      if (n < 0 && errno == EINTR) continue;
      if (n < 0) return FileError(errno, "read", paths_[path_index_]);
      end_of_file_ = n == 0;
      bytes_done_ += n;
      if (EVP_DigestUpdate(hash_.get(), pending_.data() + before, n) != 1) {
        return absl::InternalError("sha256 failed");
      }
    }
    return absl::OkStatus();
  }

  const std::vector<std::string>& paths_;
  const int64_t block_bytes_;
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> hash_;
  std::string pending_;
  std::size_t path_index_ = 0;
  int fd_ = -1;
  bool end_of_file_ = false;
  int64_t lines_before_ = 0;
  int64_t sequence_ = 0;
  int64_t bytes_done_ = 0;
  int64_t bytes_total_ = 0;
};

// Threads take blocks in turn, parse them side by side, and commit them in the blocks' order.
class ParallelReader {
 public:
  ParallelReader(BlockSource& source, const RecordRules& rules, const RecordCommit& commit,
                 const RecordProgress& progress)
      : source_(source), rules_(rules), commit_(commit), progress_(progress) {}

  absl::Status Run(int num_threads) {
    RunOnThreads(num_threads, [this](int) { Work(); });
    absl::MutexLock lock(&mutex_);
    // Lines before the place that could not be read are judged first, as one thread would.
    return status_.ok() ? source_status_ : status_;
  }

 private:
  void Work() {
    try {
      TextBlock block;
      while (Take(block)) {
        RecordChunk chunk = ParseRecordLines(block.text, rules_);
        chunk.file = block.file;
        chunk.lines_before = block.lines_before;
        Commit(block.sequence, chunk);
      }
    } catch (const std::bad_alloc&) {
      absl::MutexLock lock(&mutex_);
      Stop(absl::ResourceExhaustedError("out of memory while reading records"));
    }
  }

  bool Take(TextBlock& block) {
    absl::MutexLock reading(&source_mutex_);
    {
      absl::MutexLock lock(&mutex_);
      if (stopped_ || !source_status_.ok()) return false;
    }
    const absl::StatusOr<bool> more = source_.Next(block);
    if (!more.ok()) {
      absl::MutexLock lock(&mutex_);
      source_status_ = more.status();
      return false;
    }
    if (*more && progress_) progress_(source_.bytes_done(), source_.bytes_total());
    return *more;
  }

  void Commit(int64_t sequence, const RecordChunk& chunk) {
    absl::MutexLock lock(&mutex_);
    const auto my_turn = [this, sequence]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return stopped_ || next_commit_ == sequence;
    };
    mutex_.Await(absl::Condition(&my_turn));
    if (stopped_) return;
    if (absl::Status status = commit_(chunk); !status.ok()) Stop(std::move(status));
    ++next_commit_;
  }

  void Stop(absl::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (stopped_) return;
    stopped_ = true;
    status_ = std::move(status);
  }

  absl::Mutex source_mutex_;
  BlockSource& source_ ABSL_GUARDED_BY(source_mutex_);
  const RecordRules& rules_;
  const RecordCommit& commit_;
  const RecordProgress& progress_;
  absl::Mutex mutex_;
  int64_t next_commit_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  absl::Status source_status_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

RecordChunk ParseRecordLines(absl::string_view text, const RecordRules& rules) {
  RecordChunk chunk;
  std::string scratch;
  int64_t line_number = 0;
  while (!text.empty()) {
    ++line_number;
    const std::size_t newline = text.find('\n');
    const bool whole = newline != absl::string_view::npos;
    const absl::string_view line = text.substr(0, newline);
    text.remove_prefix(whole ? newline + 1 : text.size());
    if (IsBlank(line)) continue;
    if (line.size() > kMaxRecordLineBytes) {
      chunk.bad_lines.push_back(
          {line_number, absl::StrCat("longer than ", kMaxRecordLineBytes, " bytes")});
      continue;
    }
    absl::StatusOr<RecordRow> row = RowOf(line, rules, scratch, chunk);
    if (row.ok()) {
      row->line = line_number;
      chunk.rows.push_back(*row);
    } else {
      std::string message(row.status().message());
      if (!whole) {
        absl::StrAppend(&message, " (the file ends inside this line: cut while it was written?)");
      }
      chunk.bad_lines.push_back({line_number, std::move(message)});
    }
  }
  return chunk;
}

absl::StatusOr<std::string> ReadCalibrationRecords(const std::vector<std::string>& paths,
                                                   const RecordReadOptions& options,
                                                   const RecordCommit& commit,
                                                   const RecordProgress& progress) {
  BlockSource source(paths, options.chunk_bytes);
  KEEPSET_RETURN_IF_ERROR(source.Start());
  ParallelReader reader(source, options.rules, commit, progress);
  KEEPSET_RETURN_IF_ERROR(reader.Run(options.num_threads));
  return source.Digest();
}

}  // namespace keepset::tables
