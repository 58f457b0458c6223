// Waits for what a source or another writer does to a registry.
#ifndef KEEPSET_TESTS_FAKES_AWAIT_VIEW_H_
#define KEEPSET_TESTS_FAKES_AWAIT_VIEW_H_

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "service/registry/table_registry.h"

namespace keepset::fakes {

// True when `done` holds for the present view or for one that comes before the deadline.
inline bool AwaitView(service::TableRegistry& registry,
                      const std::function<bool(const service::RegistryView&)>& done) {
  // Long: only a failing test waits so long.
  constexpr absl::Duration kDeadline = absl::Seconds(30);
  absl::Notification found;
  uint64_t id = 0;
  // Called for one view at a time.
  const auto first =
      registry.Subscribe(&id, [&](const std::shared_ptr<const service::RegistryView>& view) {
        if (!found.HasBeenNotified() && done(*view)) found.Notify();
      });
  const bool holds = done(*first) || found.WaitForNotificationWithTimeout(kDeadline);
  registry.Unsubscribe(id);
  return holds;
}

}  // namespace keepset::fakes

#endif  // KEEPSET_TESTS_FAKES_AWAIT_VIEW_H_
