#include <memory>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "base/status_macros.h"
#include "service/registry/etcd/etcd_authority.h"
#include "service/registry/etcd/etcd_client.h"
#include "service/registry/etcd/etcd_layout.h"
#include "service/registry/etcd/etcd_mirror.h"
#include "service/registry/etcd/etcd_replica.h"
#include "service/registry/etcd/etcd_tables.h"
#include "service/registry/etcd_source_options.h"
#include "service/registry/table_source.h"

namespace keepset::service {
namespace {

absl::StatusOr<std::unique_ptr<etcd::Client>> NewClientFor(const EtcdSourceOptions& options) {
  if (options.prefix.empty() || options.prefix.find('\0') != std::string::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat("etcd.prefix=\"", options.prefix, "\", want a path such as /keepset"));
  }
  return etcd::NewClient(options.client);
}

class EtcdSource final : public TableSource {
 public:
  EtcdSource(const EtcdSourceOptions& options, const TableSourceContext& context)
      : options_(options), clock_(context.clock), client_(NewClientFor(options)) {
    if (!client_.ok()) return;
    const etcd::TablesOptions tables = {.prefix = options.prefix,
                                        .max_value_bytes = options.max_value_bytes,
                                        .shared_directory = options.shared_directory};
    replica_ = std::make_unique<etcd::EtcdReplica>(tables, context.registry, context.loader);
    mirror_ = std::make_unique<etcd::Mirror>(
        etcd::MirrorOptions{.prefix = etcd::Layout(options.prefix).root(),
                            .first_pause = options.first_pause,
                            .last_pause = options.last_pause,
                            .seed = options.seed},
        **client_, *replica_);
    authority_ = etcd::NewEtcdAuthority(tables, **client_, *replica_, context);
  }

  ~EtcdSource() override { Stop(); }

  absl::string_view kind() const override { return etcd::kSourceName; }

  absl::Status Start() override {
    KEEPSET_RETURN_IF_ERROR(client_.status());
    absl::MutexLock lock(&mutex_);
    if (files_.joinable()) return absl::FailedPreconditionError("etcd: is watched already");
    mirror_->Start();
    files_ = std::thread([this] { replica_->RetryFilesUntilStopped(options_.file_retry); });
    // Not reached is no error: the replica has said so as the source's health.
    replica_->AwaitFirstRead(clock_.Now() + options_.start_timeout);
    return absl::OkStatus();
  }

  void Stop() override {
    absl::MutexLock lock(&mutex_);
    if (!files_.joinable()) return;
    mirror_->Stop();
    replica_->Stop();
    files_.join();
  }

  RegistryAuthority* authority() override { return authority_.get(); }

 private:
  const EtcdSourceOptions options_;
  const Clock& clock_;
  const absl::StatusOr<std::unique_ptr<etcd::Client>> client_;
  // In the order in which each stands on the one before; nullptr without a client.
  std::unique_ptr<etcd::EtcdReplica> replica_;
  std::unique_ptr<etcd::Mirror> mirror_;
  std::unique_ptr<RegistryAuthority> authority_;

  absl::Mutex mutex_;
  std::thread files_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

std::unique_ptr<TableSource> NewEtcdSource(const TableSourceOptions& options,
                                           const TableSourceContext& context) {
  return std::make_unique<EtcdSource>(options.etcd, context);
}

}  // namespace keepset::service
