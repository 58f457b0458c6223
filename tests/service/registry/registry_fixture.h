// A registry on a fake clock, and the sets a source would hand to it.
#ifndef KEEPSET_TESTS_SERVICE_REGISTRY_REGISTRY_FIXTURE_H_
#define KEEPSET_TESTS_SERVICE_REGISTRY_REGISTRY_FIXTURE_H_

#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "service/registry/table_loader.h"
#include "service/registry/table_registry.h"
#include "tables/table_file.h"
#include "tests/fakes/fake_clock.h"
#include "tests/fakes/fake_registry_observer.h"
#include "tests/fakes/table_files.h"

namespace keepset::service {

inline TablePtr MakeTable(const std::string& name, const std::string& version,
                          float head_weight = 1.0f) {
  auto table =
      tables::ParseOwnedTable(fakes::TableBytes(name, version, head_weight), name + version);
  EXPECT_TRUE(table.ok()) << table.status();
  return *std::move(table);
}

inline SourceSet SetOf(std::vector<TablePtr> tables,
                       ActivationRule rule = ActivationRule::kNewest) {
  SourceSet set;
  set.rule = rule;
  for (TablePtr& table : tables) {
    SourceTable entry;
    entry.origin = table->identity().name + "-" + table->identity().version + ".safetensors";
    entry.table = std::move(table);
    set.tables.push_back(std::move(entry));
  }
  return set;
}

inline TableRef Ref(const std::string& name, const std::string& version) {
  TableRef ref;
  ref.name = name;
  ref.version = version;
  return ref;
}

inline std::unique_ptr<TableRegistry> NewRegistry(tables::TableStore& store, const Clock& clock,
                                                  RegistryObserver* observer = nullptr,
                                                  StateDirectory* state = nullptr) {
  TableRegistryOptions options;
  options.store = &store;
  options.clock = &clock;
  options.observer = observer;
  options.state = state;
  options.sources = {"directory"};
  auto registry = TableRegistry::New(options);
  EXPECT_TRUE(registry.ok()) << registry.status();
  return registry.ok() ? *std::move(registry) : nullptr;
}

class TableRegistryTest : public testing::Test {
 protected:
  // What unpinned requests of table "a" get; empty: nothing.
  std::string Active() const {
    const auto snapshot = store_.Snapshot();
    for (const TablePtr& table : snapshot->tables) {
      if (table->identity().name == "a") return table->identity().version;
    }
    return "";
  }
  std::shared_ptr<const LineView> LineA() const { return registry_->View()->lines.at("a"); }
  VersionState StateOf(const std::string& version) const {
    const std::shared_ptr<const LineView> line = LineA();
    for (const TableVersionInfo& info : line->versions) {
      if (info.version == version) return info.state;
    }
    ADD_FAILURE() << "no version " << version;
    return VersionState::kFailed;
  }
  absl::Status Upload(const std::string& version, float head_weight = 1.0f) {
    SourceTable table;
    table.table = MakeTable("a", version, head_weight);
    table.origin = "upload";
    return registry_->Load(std::move(table), {}).status();
  }
  absl::Status Activate(const std::string& version) {
    return registry_->Activate(Ref("a", version), "", {}).status();
  }

  fakes::FakeClock clock_;
  tables::TableStore store_;
  fakes::FakeRegistryObserver observer_;
  std::unique_ptr<TableRegistry> registry_ = NewRegistry(store_, clock_, &observer_);
};

}  // namespace keepset::service

#endif  // KEEPSET_TESTS_SERVICE_REGISTRY_REGISTRY_FIXTURE_H_
