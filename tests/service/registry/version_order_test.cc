#include "service/registry/version_order.h"

#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace keepset::service {
namespace {

TEST(VersionLess, CountsDigitsAsNumbers) {
  const std::vector<std::string> ascending = {"",
                                              "0",
                                              "1",
                                              "01",
                                              "1.2",
                                              "1.9",
                                              "1.10",
                                              "1.10.1",
                                              "1.10a",
                                              "2",
                                              "10",
                                              "2026-11-22.1",
                                              "2026-11-22.2",
                                              "2026-11-22.10",
                                              "a",
                                              "a1",
                                              "a2",
                                              "a10b",
                                              "a10c",
                                              "b",
                                              "99999999999999999999999999"};
  for (size_t i = 0; i < ascending.size() - 1; ++i) {
    for (size_t j = 0; j < ascending.size() - 1; ++j) {
      EXPECT_EQ(VersionLess(ascending[i], ascending[j]), i < j)
          << ascending[i] << " against " << ascending[j];
    }
  }
  EXPECT_TRUE(VersionLess("2", ascending.back()));
}

}  // namespace
}  // namespace keepset::service
