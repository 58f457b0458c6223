#include "tests/service/metrics/exposition_page.h"

#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "gtest/gtest.h"

namespace keepset::service {

ExpositionPage ParsePage(const std::string& text) {
  ExpositionPage page;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.empty()) continue;
    if (line[0] == '#') {
      std::istringstream words(line);
      std::string hash, what, name, rest;
      words >> hash >> what >> name;
      std::getline(words >> std::ws, rest);
      if (what == "TYPE") page.families[name].type = rest;
      if (what == "HELP") page.families[name].help = rest;
      continue;
    }
    const size_t space = line.rfind(' ');
    double value = 0;
    if (space == std::string::npos || !absl::SimpleAtod(line.substr(space + 1), &value)) {
      ADD_FAILURE() << "not a sample: " << line;
      continue;
    }
    page.series[line.substr(0, space)] = value;
  }
  return page;
}

double ValueOf(const ExpositionPage& page, const std::string& series) {
  const auto it = page.series.find(series);
  if (it == page.series.end()) {
    ADD_FAILURE() << "no series " << series;
    return -1;
  }
  return it->second;
}

}  // namespace keepset::service
