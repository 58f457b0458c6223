#include "service/server_tables.h"

#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "service/registry/signature_loader.h"
#include "service/registry/state_directory.h"
#include "service/registry/table_source.h"

namespace keepset::service {
namespace {

absl::Status InField(absl::string_view field, const std::string& value,
                     const absl::Status& status) {
  if (status.ok()) return status;
  return {status.code(), absl::StrCat(field, "=\"", value, "\": ", status.message())};
}

EtcdSourceOptions EtcdOptionsOf(const v1::ServerConfig::Etcd& config) {
  EtcdSourceOptions options;
  options.client.endpoints.assign(config.endpoints().begin(), config.endpoints().end());
  options.client.ca_file = config.ca_file();
  options.client.certificate_file = config.certificate_file();
  options.client.key_file = config.key_file();
  options.client.username = config.username();
  options.client.password_file = config.password_file();
  options.prefix = config.prefix();
  options.max_value_bytes = static_cast<int64_t>(config.max_value_bytes());
  options.shared_directory = config.shared_directory();
  options.start_timeout = absl::Milliseconds(config.start_timeout_ms());
  return options;
}

class ServerTablesImpl final : public ServerTables {
 public:
  ServerTablesImpl(const v1::ServerConfig& config, tables::TableStore& store, const Clock& clock,
                   Metrics& metrics, RegistryObserver& observer)
      : config_(config), store_(store), clock_(clock), metrics_(metrics), observer_(observer) {}

  ~ServerTablesImpl() override { Stop(); }

  absl::Status Init() {
    const std::string& path = config_.state_directory();
    if (!path.empty()) {
      absl::StatusOr<std::unique_ptr<StateDirectory>> state = StateDirectory::Open(path);
      if (!state.ok()) return InField("state_directory", path, state.status());
      state_ = *std::move(state);
    }
    loader_ = state_ == nullptr ? NewTableLoader() : NewMappingTableLoader(*state_);
    validator_ = NewTableLoader();
    KEEPSET_RETURN_IF_ERROR(WantSignatures());
    TableRegistryOptions options;
    options.store = &store_;
    options.clock = &clock_;
    options.observer = &observer_;
    options.state = state_.get();
    options.recovery_check = recovery_check_;
    if (!config_.tables_directory().empty()) options.sources.emplace_back("directory");
    if (config_.has_etcd()) options.sources.emplace_back("etcd");
    absl::StatusOr<std::unique_ptr<TableRegistry>> registry = TableRegistry::New(options);
    if (!registry.ok()) return InField("state_directory", path, registry.status());
    registry_ = *std::move(registry);
    authority_ = NewLocalAuthority(*registry_, *loader_);
    KEEPSET_RETURN_IF_ERROR(StartDirectory());
    return StartEtcd();
  }

  TableRegistry& registry() override { return *registry_; }
  RegistryAuthority& authority() override {
    return etcd_ != nullptr ? *etcd_->authority() : *authority_;
  }
  TableLoader& validator() override { return *validator_; }
  void Stop() override {
    if (directory_ != nullptr) directory_->Stop();
    if (etcd_ != nullptr) etcd_->Stop();
  }

 private:
  // No table passes that the configuration wants signed and is not, wherever it comes from.
  absl::Status WantSignatures() {
    if (config_.trusted_key_files().empty()) return absl::OkStatus();
    const std::vector<std::string> paths(config_.trusted_key_files().begin(),
                                         config_.trusted_key_files().end());
    const absl::StatusOr<tables::TrustedKeys> keys = tables::TrustedKeys::Read(paths);
    if (!keys.ok()) {
      return {keys.status().code(), absl::StrCat("trusted_key_files: ", keys.status().message())};
    }
    const SignatureRule rule =
        config_.require_signature() ? SignatureRule::kRequired : SignatureRule::kWhereSigned;
    recovery_check_ = [keys = *keys, rule](absl::Span<const std::byte> bytes,
                                           absl::string_view signature, absl::string_view label) {
      return CheckSignature(bytes, signature, label, keys, rule);
    };
    loader_ = NewSignatureLoader(std::move(loader_), *keys, rule);
    validator_ = NewSignatureLoader(std::move(validator_), *keys, rule);
    return absl::OkStatus();
  }

  absl::Status StartDirectory() {
    if (config_.tables_directory().empty()) return absl::OkStatus();
    TableSourceOptions options;
    options.directory.directory = config_.tables_directory();
    directory_ =
        NewDirectorySource(options, {.registry = *registry_, .loader = *loader_, .clock = clock_});
    metrics_.EnableTableSource(directory_->kind());
    return InField("tables_directory", config_.tables_directory(), directory_->Start());
  }

  absl::Status StartEtcd() {
    if (!config_.has_etcd()) return absl::OkStatus();
    TableSourceOptions options;
    options.etcd = EtcdOptionsOf(config_.etcd());
    options.etcd.seed = static_cast<uint64_t>(absl::ToUnixNanos(clock_.Now()));
    etcd_ = NewEtcdSource(options, {.registry = *registry_, .loader = *loader_, .clock = clock_});
    metrics_.EnableTableSource(etcd_->kind());
    return etcd_->Start();
  }

  const v1::ServerConfig& config_;
  tables::TableStore& store_;
  const Clock& clock_;
  Metrics& metrics_;
  RegistryObserver& observer_;
  std::unique_ptr<StateDirectory> state_;
  RecoveryCheck recovery_check_;
  std::unique_ptr<TableLoader> loader_;
  std::unique_ptr<TableLoader> validator_;
  std::unique_ptr<TableRegistry> registry_;
  std::unique_ptr<RegistryAuthority> authority_;
  std::unique_ptr<TableSource> directory_;
  std::unique_ptr<TableSource> etcd_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ServerTables>> ServerTables::Start(const v1::ServerConfig& config,
                                                                  tables::TableStore& store,
                                                                  const Clock& clock,
                                                                  Metrics& metrics,
                                                                  RegistryObserver& observer) {
  auto server_tables = std::make_unique<ServerTablesImpl>(config, store, clock, metrics, observer);
  KEEPSET_RETURN_IF_ERROR(server_tables->Init());
  return server_tables;
}

}  // namespace keepset::service
