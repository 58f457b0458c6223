#include "service/metrics/families.h"

#include "base/check.h"

namespace keepset::service {

using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;

Family<Counter>& CounterFamily(prometheus::Registry& registry, const MetricInfo& info) {
  KEEPSET_CHECK(info.type == MetricType::kCounter);
  return prometheus::BuildCounter()
      .Name(std::string(info.name))
      .Help(std::string(info.help))
      .Register(registry);
}

Family<Gauge>& GaugeFamily(prometheus::Registry& registry, const MetricInfo& info) {
  KEEPSET_CHECK(info.type == MetricType::kGauge);
  return prometheus::BuildGauge()
      .Name(std::string(info.name))
      .Help(std::string(info.help))
      .Register(registry);
}

Family<Histogram>& HistogramFamily(prometheus::Registry& registry, const MetricInfo& info) {
  KEEPSET_CHECK(info.type == MetricType::kHistogram);
  return prometheus::BuildHistogram()
      .Name(std::string(info.name))
      .Help(std::string(info.help))
      .Register(registry);
}

}  // namespace keepset::service
