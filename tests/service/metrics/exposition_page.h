// Reads a page in Prometheus text format back, as far as tests need it.
#ifndef KEEPSET_TESTS_SERVICE_METRICS_EXPOSITION_PAGE_H_
#define KEEPSET_TESTS_SERVICE_METRICS_EXPOSITION_PAGE_H_

#include <map>
#include <string>

namespace keepset::service {

struct ExpositionPage {
  struct Family {
    std::string type;  // "counter"
    std::string help;
  };
  std::map<std::string, Family> families;
  std::map<std::string, double> series;  // "name{label=\"value\"}" as written -> value
};

// Adds a test failure for a line that is neither comment nor sample.
ExpositionPage ParsePage(const std::string& text);

// The value of one series; adds a test failure when the page has none of that name.
double ValueOf(const ExpositionPage& page, const std::string& series);

}  // namespace keepset::service

#endif  // KEEPSET_TESTS_SERVICE_METRICS_EXPOSITION_PAGE_H_
