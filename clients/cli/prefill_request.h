// One request made of a capture and the command's flags: the spec of the C ABI and the layers'
// views. The remote path translates it into wire terms, so both paths ask the same thing.
#ifndef KEEPSET_CLIENTS_CLI_PREFILL_REQUEST_H_
#define KEEPSET_CLIENTS_CLI_PREFILL_REQUEST_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "clients/cli/compress_options.h"
#include "clients/cli/engine_handles.h"
#include "clients/cpp/operation.h"
#include "engine/keepset.h"

namespace keepset::cli {

class PrefillRequest {
 public:
  // `options` must outlive the request.
  static absl::StatusOr<std::unique_ptr<PrefillRequest>> Open(const CompressOptions& options);
  PrefillRequest(const PrefillRequest&) = delete;
  PrefillRequest& operator=(const PrefillRequest&) = delete;

  // Without a table; pointers belong to the request.
  const keepset_operation_spec& spec() const { return spec_; }
  int64_t num_layers() const { return model_.num_layers; }
  int64_t num_kv_heads() const { return model_.num_kv_heads; }
  int64_t head_dim() const { return model_.head_dim; }
  int64_t value_head_dim() const {
    return spec_.value_head_dim > 0 ? spec_.value_head_dim : model_.head_dim;
  }

  // Views of one layer, into the capture.
  absl::StatusOr<keepset_layer_observation> Layer(int64_t layer) const;

  // The same request in the client's terms, without gathering.
  client::OperationSpec ClientSpec() const;

 private:
  explicit PrefillRequest(CaptureHandle capture) : capture_(std::move(capture)) {}

  absl::Status Fill(const CompressOptions& options);
  absl::Status ReadModel();

  const CaptureHandle capture_;
  keepset_operation_spec spec_ = {};
  client::ModelFingerprint model_;
  std::string observe_;  // a parameter's value
  std::vector<keepset_parameter> parameters_;
  std::vector<keepset_span> spans_;
};

}  // namespace keepset::cli

#endif  // KEEPSET_CLIENTS_CLI_PREFILL_REQUEST_H_
