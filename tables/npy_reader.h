// Reader of NumPy .npy arrays, for the importer. Private to tables/.
#ifndef KEEPSET_TABLES_NPY_READER_H_
#define KEEPSET_TABLES_NPY_READER_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace keepset::tables {

struct NpyArray {
  std::vector<int64_t> shape;
  std::vector<float> values;  // row-major, finite
};

// Format versions 1 to 3, little-endian f4 or f8 (rounded to f4), C or Fortran order.
// InvalidArgument for everything else; object arrays hold pickles and are never looked into.
absl::StatusOr<NpyArray> ParseNpy(absl::Span<const std::byte> bytes, absl::string_view label);
absl::StatusOr<NpyArray> ReadNpy(const std::string& path);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_NPY_READER_H_
