#include <algorithm>
#include <map>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/text.h"
#include "tables/observation_heads_table.h"
#include "tables/strict_json.h"
#include "tables/table_file.h"

namespace keepset::tables {
namespace {

using Json = nlohmann::json;

std::string ValueText(const Json* value) {
  return value == nullptr ? "(none)" : PreviewJson(*value);
}

// Depth is bounded: both documents passed ParseStrictJson.
void DiffJson(const std::string& path, const Json* a, const Json* b,
              std::vector<std::string>& lines) {
  if (a != nullptr && b != nullptr) {
    if (*a == *b) return;
    if (a->is_object() && b->is_object()) {
      const auto child = [](const Json& object, const std::string& key) {
        const auto it = object.find(key);
        return it == object.end() ? nullptr : &*it;
      };
      Json keys = *a;
      keys.update(*b);
      for (const auto& [key, unused] : keys.items()) {
        DiffJson(path.empty() ? key : absl::StrCat(path, ".", key), child(*a, key), child(*b, key),
                 lines);
      }
      return;
    }
  }
  lines.push_back(absl::StrCat(ToPrintable(path), ": ", ValueText(a), " -> ", ValueText(b)));
}

template <typename T>
void DiffValues(absl::string_view name, absl::Span<const T> a, absl::Span<const T> b,
                std::vector<std::string>& lines) {
  if (a.size() != b.size()) {
    lines.push_back(absl::StrCat(name, ": ", a.size(), " elements -> ", b.size()));
    return;
  }
  int64_t differing = 0;
  std::size_t first = 0;
  double largest = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i]) continue;
    if (differing++ == 0) first = i;
    largest = std::max(largest, std::abs(static_cast<double>(b[i]) - static_cast<double>(a[i])));
  }
  if (differing == 0) return;
  lines.push_back(absl::StrCat(name, ": ", differing, " of ", a.size(), " elements differ, first [",
                               first, "] ", a[first], " -> ", b[first], ", largest difference ",
                               largest));
}

void DiffCompilerKv(const CompilerKvTable& a, const CompilerKvTable& b,
                    std::vector<std::string>& lines) {
  DiffValues("budgets", a.budgets(), b.budgets(), lines);
  DiffValues("entropy_edges", a.entropy_edges(), b.entropy_edges(), lines);
  DiffValues("ppl_edges", a.ppl_edges(), b.ppl_edges(), lines);
  DiffValues("head_weights", a.head_weights(), b.head_weights(), lines);
  DiffValues("gate_thresholds", a.gate_thresholds(), b.gate_thresholds(), lines);
}

// By observation, so that the order of the list is no difference.
void DiffObservationHeads(const ObservationHeadsTable& a, const ObservationHeadsTable& b,
                          std::vector<std::string>& lines) {
  DiffValues("budgets", a.budgets(), b.budgets(), lines);
  using Key = std::tuple<int64_t, int64_t, ObservedRows>;
  std::map<Key, std::pair<std::string, std::string>> weights;
  const auto add = [&](const ObservationHeadsTable& table, auto side) {
    for (const HeadObservation& one : table.observations()) {
      std::pair<std::string, std::string>& both =
          weights.try_emplace({one.layer, one.head, one.rows}, "(none)", "(none)").first->second;
      both.*side = absl::StrCat(one.weight);
    }
  };
  add(a, &std::pair<std::string, std::string>::first);
  add(b, &std::pair<std::string, std::string>::second);
  for (const auto& [key, both] : weights) {
    if (both.first == both.second) continue;
    const auto& [layer, head, rows] = key;
    lines.push_back(absl::StrCat("weight of layer ", layer, " head ", head, " ",
                                 ObservedRowsName(rows), ": ", both.first, " -> ", both.second));
  }
}

}  // namespace

std::vector<std::string> DiffTables(const DecisionTable& a, const DecisionTable& b) {
  std::vector<std::string> lines;
  if (a.kind() != b.kind()) lines.push_back(absl::StrCat("kind: ", a.kind(), " -> ", b.kind()));
  Json a_document = Json::parse(a.metadata_json(), nullptr, false);
  Json b_document = Json::parse(b.metadata_json(), nullptr, false);
  // A stated and an implied kind are the same content.
  if (a_document.is_object()) a_document.erase("kind");
  if (b_document.is_object()) b_document.erase("kind");
  DiffJson("", &a_document, &b_document, lines);
  if (a.AsCompilerKv() != nullptr && b.AsCompilerKv() != nullptr) {
    DiffCompilerKv(*a.AsCompilerKv(), *b.AsCompilerKv(), lines);
  }
  if (a.AsObservationHeads() != nullptr && b.AsObservationHeads() != nullptr) {
    DiffObservationHeads(*a.AsObservationHeads(), *b.AsObservationHeads(), lines);
  }
  return lines;
}

}  // namespace keepset::tables
