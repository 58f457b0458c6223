// One input as a safetensors file, a table, a capture, an observation record and a .npy array.
#include <cstddef>
#include <cstdint>

#include "base/check.h"
#include "tables/capture_file.h"
#include "tables/npy_reader.h"
#include "tables/observation_heads_table.h"
#include "tables/observation_record.h"
#include "tables/safetensors.h"
#include "tables/table_file.h"

namespace keepset::tables {
namespace {

// Reads every byte a view offers, so that a view beyond the file is a fault the sanitizer sees.
void TouchTensors(const SafetensorsFile& file) {
  std::size_t sum = 0;
  for (const TensorInfo& tensor : file.tensors()) {
    for (const std::byte byte : tensor.bytes) sum += static_cast<std::size_t>(byte);
    KEEPSET_CHECK(tensor.bytes.size() == tensor.num_elements * TensorDTypeBytes(tensor.dtype));
    if (!tensor.bytes.empty()) {
      ReadFloats(file, tensor).status().IgnoreError();
      ReadInts(file, tensor).status().IgnoreError();
    }
  }
  volatile std::size_t sink = sum;
  static_cast<void>(sink);
}

void UseTable(const DecisionTable& table) {
  KEEPSET_CHECK(!InspectTable(table).empty());
  KEEPSET_CHECK(DiffTables(table, table).empty());
  KEEPSET_CHECK(!CompareTables(table, table).empty());
  if (const CompilerKvTable* compilerkv = table.AsCompilerKv()) {
    KEEPSET_CHECK(
        compilerkv->Slice(100, TableBudgetMatch::kNearest, 3, LayerMatch::kInterpolateDepth).ok());
  }
  if (const ObservationHeadsTable* heads = table.AsObservationHeads()) {
    KEEPSET_CHECK(!heads->observations().empty());
    for (const HeadObservation& one : heads->observations()) {
      KEEPSET_CHECK(!ObservedRowsName(one.rows).empty() && one.weight >= 0.0f);
    }
  }
}

void ParseAll(absl::Span<const std::byte> bytes) {
  if (const auto file = SafetensorsFile::Parse(bytes, "fuzz"); file.ok()) TouchTensors(**file);
  if (const auto table = ParseTable(bytes, "fuzz"); table.ok()) UseTable(**table);
  CaptureFile::Parse(bytes, "fuzz").status().IgnoreError();
  if (const auto file = SafetensorsFile::Parse(bytes, "fuzz"); file.ok()) {
    ParseObservationRecord(**file).status().IgnoreError();
  }
  ParseNpy(bytes, "fuzz").status().IgnoreError();
}

}  // namespace
}  // namespace keepset::tables

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, std::size_t size) {
  keepset::tables::ParseAll({reinterpret_cast<const std::byte*>(data), size});
  return 0;
}
