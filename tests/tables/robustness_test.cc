#include "gtest/gtest.h"
#include "tables/table_file.h"
#include "tests/tables/table_samples.h"

namespace keepset::tables {
namespace {

// A file may come out valid after a change (a name, a value inside its range); it must never come
// out as anything but a table or a refusal.
bool IsTableOrRefusal(const std::string& bytes) {
  const auto table = ParseTable(AsBytes(bytes), "damaged");
  return table.ok() || table.status().code() == absl::StatusCode::kInvalidArgument ||
         table.status().code() == absl::StatusCode::kFailedPrecondition;
}

TEST(DamagedTable, AnyChangedByteGivesATableOrARefusal) {
  const std::string whole = *SerializeTable(SmallTable());
  for (std::size_t i = 0; i < whole.size(); ++i) {
    for (const char value : {'\0', '\xff', '"', '{', '9', static_cast<char>(whole[i] ^ 1)}) {
      std::string damaged = whole;
      damaged[i] = value;
      ASSERT_TRUE(IsTableOrRefusal(damaged)) << i;
    }
  }
}

TEST(DamagedTable, AnyRemovedByteIsRefused) {
  const std::string whole = *SerializeTable(SmallTable());
  for (std::size_t i = 0; i < whole.size(); ++i) {
    std::string damaged = whole;
    damaged.erase(i, 1);
    ASSERT_FALSE(ParseTable(AsBytes(damaged), "damaged").ok()) << i;
  }
}

}  // namespace
}  // namespace keepset::tables
