#include <cstddef>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/status_macros.h"
#include "service/registry/table_registry.h"
#include "tables/table_file.h"

namespace keepset::service {
namespace {

class LocalAuthority final : public RegistryAuthority {
 public:
  LocalAuthority(TableRegistry& registry, TableLoader& loader)
      : registry_(registry), loader_(loader) {}

  absl::string_view kind() const override { return "local"; }

  absl::StatusOr<LoadReceipt> Load(const LoadArgs& args, const WriteContext& context) override {
    // Before the loader keeps it anywhere.
    if (!args.expected_digest.empty()) {
      const std::string digest = tables::FileDigest(absl::MakeConstSpan(
          reinterpret_cast<const std::byte*>(args.bytes.data()), args.bytes.size()));
      if (digest != args.expected_digest) {
        return absl::InvalidArgumentError(
            absl::StrCat(args.origin, ": digest=", digest, ", want ", args.expected_digest));
      }
    }
    SourceTable upload;
    KEEPSET_ASSIGN_OR_RETURN(upload.table,
                             loader_.LoadTable({args.bytes, args.origin, args.signature}));
    upload.origin = args.origin;
    return registry_.Load(std::move(upload), context);
  }
  absl::StatusOr<WriteReceipt> Activate(const TableRef& table, absl::string_view set_alias,
                                        const WriteContext& context) override {
    return registry_.Activate(table, set_alias, context);
  }
  absl::StatusOr<WriteReceipt> FollowNewest(absl::string_view name,
                                            const WriteContext& context) override {
    return registry_.FollowNewest(name, context);
  }
  absl::StatusOr<WriteReceipt> Rollback(absl::string_view name,
                                        const WriteContext& context) override {
    return registry_.Rollback(name, context);
  }
  absl::StatusOr<WriteReceipt> SetCanary(const TableRef& table, int basis_points,
                                         absl::string_view salt,
                                         const WriteContext& context) override {
    return registry_.SetCanary(table, basis_points, salt, context);
  }
  absl::StatusOr<WriteReceipt> SetAlias(absl::string_view name, absl::string_view alias,
                                        const TableRef& table,
                                        const WriteContext& context) override {
    return registry_.SetAlias(name, alias, table, context);
  }
  absl::StatusOr<WriteReceipt> Unload(const TableRef& table, const WriteContext& context) override {
    return registry_.Unload(table, context);
  }

 private:
  TableRegistry& registry_;
  TableLoader& loader_;
};

}  // namespace

std::unique_ptr<RegistryAuthority> NewLocalAuthority(TableRegistry& registry, TableLoader& loader) {
  return std::make_unique<LocalAuthority>(registry, loader);
}

}  // namespace keepset::service
