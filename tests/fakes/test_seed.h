// Where tests and benchmarks take the seed of their random data from: fixed numbers in every run,
// others where KEEPSET_TEST_SEED says so.
#ifndef KEEPSET_TESTS_FAKES_TEST_SEED_H_
#define KEEPSET_TESTS_FAKES_TEST_SEED_H_

#include <cstdint>
#include <cstdlib>
#include <string>

namespace keepset::fakes {

inline constexpr const char* kTestSeedVariable = "KEEPSET_TEST_SEED";

// The variable's value; empty: it is not set, and seeds are the fixed ones.
inline std::string TestSeedText() {
  const char* const value = std::getenv(kTestSeedVariable);
  return value == nullptr ? "" : value;
}

// splitmix64.
inline uint64_t MixBits(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// `fixed`, or a seed made of it and KEEPSET_TEST_SEED: calls with different numbers get different
// seeds either way.
inline uint32_t TestSeed(uint32_t fixed) {
  const std::string text = TestSeedText();
  if (text.empty()) return fixed;
  uint64_t seed = fixed;
  for (const char c : text) seed = MixBits(seed ^ static_cast<unsigned char>(c));
  return static_cast<uint32_t>(seed);
}

}  // namespace keepset::fakes

#endif  // KEEPSET_TESTS_FAKES_TEST_SEED_H_
