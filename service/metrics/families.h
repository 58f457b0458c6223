// Families and series of the Prometheus library by the list of names. Private to service/metrics.
#ifndef KEEPSET_SERVICE_METRICS_FAMILIES_H_
#define KEEPSET_SERVICE_METRICS_FAMILIES_H_

#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "prometheus/counter.h"
#include "prometheus/family.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"
#include "service/metrics/metric_names.h"

namespace keepset::service {

// `info` is of that type.
prometheus::Family<prometheus::Counter>& CounterFamily(prometheus::Registry& registry,
                                                       const MetricInfo& info);
prometheus::Family<prometheus::Gauge>& GaugeFamily(prometheus::Registry& registry,
                                                   const MetricInfo& info);
prometheus::Family<prometheus::Histogram>& HistogramFamily(prometheus::Registry& registry,
                                                           const MetricInfo& info);

// The series of a family with one label, made at construction; a value outside the set is
// kOtherValue's series.
template <typename T>
class LabelledSeries {
 public:
  template <typename Values>
  LabelledSeries(prometheus::Family<T>& family, const MetricInfo& info, const Values& values) {
    for (const auto& value : values) Add(family, info, value);
    Add(family, info, kOtherValue);
  }

  T& Of(absl::string_view value) const {
    const auto it = series_.find(value);
    return it == series_.end() ? *series_.find(kOtherValue)->second : *it->second;
  }

 private:
  void Add(prometheus::Family<T>& family, const MetricInfo& info, absl::string_view value) {
    series_[std::string(value)] = &family.Add({{std::string(info.labels), std::string(value)}});
  }

  absl::flat_hash_map<std::string, T*> series_;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_METRICS_FAMILIES_H_
