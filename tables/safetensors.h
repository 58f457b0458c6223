// Strict reader and writer of safetensors files (formats.md "safetensors, strictly").
//
// The reader maps a file (or borrows bytes), checks the header completely and hands out views into
// the mapping. Nothing of the file is trusted: lengths, offsets and shapes are checked without
// overflow. A reader is immutable after Open and thread-safe.
#ifndef KEEPSET_TABLES_SAFETENSORS_H_
#define KEEPSET_TABLES_SAFETENSORS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace keepset::tables {

enum class TensorDType {
  kF64,
  kF32,
  kF16,
  kBF16,
  kI64,
  kI32,
  kI16,
  kI8,
  kU64,
  kU32,
  kU16,
  kU8,
  kF8E4M3,  // named so that a file may carry them beside the tensors we read
  kF8E5M2,
  kBool
};

int64_t TensorDTypeBytes(TensorDType dtype);
absl::string_view TensorDTypeName(TensorDType dtype);  // "F32"

struct TensorInfo {
  std::string name;
  TensorDType dtype = TensorDType::kF32;
  std::vector<int64_t> shape;
  absl::Span<const std::byte> bytes;  // into the file's mapping; may be unaligned
  int64_t num_elements = 0;
};

// Whether the bytes a reader works on are the file's mapping or a private copy. A file that another
// process may rewrite in place must be copied: a mapping of it can change, or fault, while it is
// read.
enum class ReadMode { kMap, kCopy };

class SafetensorsFile {
 public:
  // NotFound when the file is missing, InvalidArgument for every damage (message: path, field,
  // value, what would be right). kCopy takes files up to 1 GiB and returns Aborted when the file
  // changed while it was read.
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Open(const std::string& path,
                                                               ReadMode mode);

  // Parses `bytes`, which are copied. `label` stands for the path in messages.
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> Parse(absl::Span<const std::byte> bytes,
                                                                absl::string_view label);
  // The same of bytes that are handed over.
  static absl::StatusOr<std::unique_ptr<SafetensorsFile>> ParseOwned(std::string bytes,
                                                                     absl::string_view label);

  virtual ~SafetensorsFile() = default;

  virtual const std::string& label() const = 0;
  // Value of `__metadata__` under `key`, or nullptr.
  virtual const std::string* metadata(absl::string_view key) const = 0;
  virtual const std::map<std::string, std::string, std::less<>>& all_metadata() const = 0;
  virtual const std::vector<TensorInfo>& tensors() const = 0;
  // nullptr when absent.
  virtual const TensorInfo* Find(absl::string_view name) const = 0;
  // "sha256:<hex>" of the whole file's bytes as read.
  virtual std::string Digest() const = 0;
  // The whole file.
  virtual absl::Span<const std::byte> bytes() const = 0;
  // Takes a mapped file's pages out of this process's resident memory until they are read again.
  virtual void ReleasePages() const = 0;
};

// Elements of an F32, F16 or BF16 tensor widened to fp32; InvalidArgument on another dtype or when
// an element is NaN or Inf.
absl::StatusOr<std::vector<float>> ReadFloats(const SafetensorsFile& file,
                                              const TensorInfo& tensor);
// Elements of an F32 tensor where they lie in the file, or a copy of them where they lie unaligned.
// Moving keeps `values` valid; `copy` owns them or is empty.
struct FloatTensor {
  absl::Span<const float> values;
  std::vector<float> copy;
};
// Errors as ReadFloats. `file` must outlive the result.
absl::StatusOr<FloatTensor> ViewFloats(const SafetensorsFile& file, const TensorInfo& tensor);

// Elements of an I32 or I64 tensor.
absl::StatusOr<std::vector<int64_t>> ReadInts(const SafetensorsFile& file,
                                              const TensorInfo& tensor);

struct TensorToWrite {
  std::string name;
  TensorDType dtype = TensorDType::kF32;
  std::vector<int64_t> shape;
  absl::Span<const std::byte> bytes;
};

// Serialises to memory: 8-byte header length, header padded with spaces to a multiple of 8, tensors
// in the given order. InvalidArgument when shape and bytes disagree or a name appears twice.
absl::StatusOr<std::string> SerializeSafetensors(const std::map<std::string, std::string>& metadata,
                                                 const std::vector<TensorToWrite>& tensors);

// Writes `bytes` to a temporary name in the same directory, syncs, renames; a failure leaves no
// file. ResourceExhausted when the disk is full, PermissionDenied / NotFound for the directory.
absl::Status WriteFileAtomically(const std::string& path, absl::string_view bytes);
// The same without syncing: readers see the old file or the new one, a machine that stops may leave
// a torn one.
absl::Status ReplaceFile(const std::string& path, absl::string_view bytes);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_SAFETENSORS_H_
