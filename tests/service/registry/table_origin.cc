#include "tests/service/registry/table_origin.h"

#include <gtest/gtest.h>

#include <map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "service/registry/etcd/etcd_layout.h"
#include "tables/table_file.h"
#include "tests/fakes/table_files.h"
#include "tests/integration/etcd_server.h"

namespace keepset::service {
namespace {

class DirectoryOrigin final : public TableOrigin {
 public:
  TableSourceOptions Options() const override {
    TableSourceOptions options;
    options.directory.directory = directory_.path();
    options.directory.debounce = absl::Milliseconds(1);
    return options;
  }
  void Place(const std::string& table, const std::string& bytes) override {
    fakes::WriteAndRename(directory_ / PlaceOf(table), bytes);
  }
  std::string PlaceOf(const std::string& table) const override { return table + ".safetensors"; }

 private:
  const fakes::ScratchDirectory directory_;
};

class EtcdOrigin final : public TableOrigin {
 public:
  EtcdOrigin() { EXPECT_TRUE(server_.Start()); }

  TableSourceOptions Options() const override {
    TableSourceOptions options;
    options.etcd.client.endpoints = {server_.endpoint()};
    options.etcd.first_pause = absl::Milliseconds(10);
    return options;
  }
  void Place(const std::string& table, const std::string& bytes) override {
    const auto parsed = tables::ParseTable(
        absl::MakeConstSpan(reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()), table);
    if (!parsed.ok()) {
      server_.Put(PlaceOf(table), bytes);
      return;
    }
    const std::string before = PlaceOf(table);
    const tables::TableIdentity& identity = (*parsed)->identity();
    places_[table] = layout_.TableKey(identity.name, identity.version);
    LineAssignment line;
    line.mode = LineMode::kChosen;
    line.active = TableTarget{identity.version, identity.digest};
    const std::string gone = before == places_[table] ? "" : before;
    server_.Commit({{places_[table], bytes}, {layout_.LineKey(table), etcd::SerializeLine(line)}},
                   gone);
  }
  std::string PlaceOf(const std::string& table) const override {
    const auto place = places_.find(table);
    return place == places_.end() ? layout_.TableKey(table, "1") : place->second;
  }

 private:
  integration::EtcdServer server_;
  const etcd::Layout layout_{"/keepset"};
  std::map<std::string, std::string> places_;  // etcd key, by table
};

}  // namespace

std::unique_ptr<TableOrigin> NewTableOrigin(const std::string& kind) {
  if (kind == "directory") return std::make_unique<DirectoryOrigin>();
  if (kind == "etcd") return std::make_unique<EtcdOrigin>();
  ADD_FAILURE() << "source " << kind << " has no origin in " << __FILE__;
  return nullptr;
}

}  // namespace keepset::service
