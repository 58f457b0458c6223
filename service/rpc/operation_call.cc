#include "service/rpc/operation_call.h"

#include <algorithm>
#include <exception>
#include <iterator>
#include <new>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/status_macros.h"
#include "base/text.h"
#include "service/metrics/metric_names.h"
#include "service/rpc/layer_groups.h"
#include "service/rpc/result_codec.h"
#include "service/rpc/wire_status.h"

namespace keepset::service {
namespace {

// A peer's text in our log.
constexpr size_t kMaxLoggedText = 128;
constexpr size_t kMaxLoggedError = 2048;
// The fence table remembers thousands of them per session.
constexpr size_t kMaxRequestIdBytes = 256;
// Keep indices of one operation, 4 bytes each: 1 GiB here, and a reply gRPC can send.
constexpr int64_t kMaxReplyPositions = int64_t{1} << 28;

// A policy may do without a layer, gathering cannot.
absl::Status MissingForGather(size_t layer) {
  return absl::InvalidArgumentError(
      absl::StrCat("layer ", layer,
                   ": was not sent, gathering needs K and V of every layer in ascending order"));
}

// A layer of a prompt takes time in proportion to its length.
constexpr uint64_t kSizeClassBounds[] = {4096, 32768};
int SizeClass(uint64_t seq_len) {
  return static_cast<int>(
      std::lower_bound(std::begin(kSizeClassBounds), std::end(kSizeClassBounds), seq_len) -
      std::begin(kSizeClassBounds));
}

std::string Milliseconds(absl::Duration time) {
  return absl::StrFormat("%.3f", absl::ToDoubleMilliseconds(time));
}

v1::TableSelection EncodeSelection(tables::TableSelection selection, bool by_session) {
  switch (selection) {
    case tables::TableSelection::kActive:
      return v1::TABLE_SELECTION_ACTIVE;
    case tables::TableSelection::kCanary:
      return v1::TABLE_SELECTION_CANARY;
    case tables::TableSelection::kPinned:
      return by_session ? v1::TABLE_SELECTION_SESSION : v1::TABLE_SELECTION_PINNED;
  }
  return v1::TABLE_SELECTION_UNSPECIFIED;
}

}  // namespace

OperationCall::OperationCall(const ServiceContext& context, const CallInfo& info,
                             const v1::OperationSpec& spec)
    : context_(context),
      info_(info),
      wire_(spec),
      arrival_(context.clock.Monotonic()),
      correlation_id_(context.correlation_ids.Next()),
      snapshot_(context.tables.Snapshot()),
      leases_(context.sessions, spec.session_id()) {
  // Kept with the totals: what a request may call a policy has no bound.
  const bool is_known = context.policies.NativeScope(spec.policy()).ok();
  sample_.policy = is_known ? spec.policy() : std::string(kUnknownPolicy);
  sample_.model = spec.model().architecture();
}

OperationCall::~OperationCall() { End(absl::CancelledError("dropped")).IgnoreError(); }

absl::Status OperationCall::Admit() {
  absl::StatusOr<Admission::Ticket> ticket = context_.admission.Enter();
  if (!ticket.ok()) {
    MarkReject(Reject::kDraining);
    return std::move(ticket).status();
  }
  ticket_ = *std::move(ticket);
  if (wire_.request_id().size() > kMaxRequestIdBytes) {
    return absl::InvalidArgumentError(absl::StrCat("request_id: ", wire_.request_id().size(),
                                                   " bytes, want 0..", kMaxRequestIdBytes));
  }
  if (!wire_.session_id().empty()) {
    KEEPSET_RETURN_IF_ERROR(context_.sessions.CheckSession(wire_.session_id()));
  }
  KEEPSET_RETURN_IF_ERROR(
      context_.fences.Check(wire_.session_id(), wire_.request_id(), wire_.request_generation()));
  if (wire_.session_id().empty()) return absl::OkStatus();
  // A session that ended meanwhile must not leave its fences behind.
  absl::Status alive = context_.sessions.CheckSession(wire_.session_id());
  if (!alive.ok()) context_.fences.Forget(wire_.session_id());
  return alive;
}

absl::Status OperationCall::LeaseLayer(const v1::LayerInput& layer) {
  const absl::Duration start = context_.clock.Monotonic();
  absl::MutexLock lock(&reader_mutex_);
  inline_bytes_ += InlineBytes(layer);
  if (inline_bytes_ > context_.codec.max_inline_bytes) {
    reject_ = Reject::kInlineTooLarge;
    return absl::ResourceExhaustedError(absl::StrCat(
        "layer ", layer.layer(), ": ", inline_bytes_,
        " inline bytes in this operation, want at most ", context_.codec.max_inline_bytes,
        "; larger tensors belong into registered regions"));
  }
  KEEPSET_RETURN_IF_ERROR(
      VisitRegions(layer, [this](const std::string& id) { return leases_.Acquire(id); }));
  lease_time_ += context_.clock.Monotonic() - start;
  return absl::OkStatus();
}

WorkQueue::Flow OperationCall::QueueFlow() const {
  const std::optional<std::string> tenant = context_.session_tenants.Of(wire_.session_id());
  // A name the client chose is never taken for a session's id.
  return {tenant.has_value() ? absl::StrCat("tenant ", *tenant)
                             : absl::StrCat("session ", wire_.session_id()),
          SizeClass(wire_.seq_len())};
}

absl::Duration OperationCall::LeaseTime() const {
  absl::MutexLock lock(&reader_mutex_);
  return lease_time_;
}

void OperationCall::MarkReject(Reject why) {
  absl::MutexLock lock(&reader_mutex_);
  reject_ = why;
}

void OperationCall::OnDequeued() {
  queue_time_ = std::max(absl::ZeroDuration(), context_.clock.Monotonic() - arrival_ - LeaseTime());
}

absl::Status OperationCall::ResolveTable(engine::OperationSpec& spec) {
  KEEPSET_ASSIGN_OR_RETURN(const std::string kind, context_.policies.TableKind(spec.policy));
  if (kind.empty()) {
    if (wire_.has_shadow_table()) {
      shadow_ = absl::InvalidArgumentError(
          absl::StrCat("shadow_table: policy ", spec.policy, " reads no table"));
    }
    return absl::OkStatus();
  }
  KEEPSET_ASSIGN_OR_RETURN(tables::TableQuery query, DecodeTableQuery(wire_, spec, kind));
  bool by_session = false;
  if (query.name.empty() && !query.pins() && !wire_.session_id().empty()) {
    const std::optional<v1::TablePin> pin = context_.session_pins.Of(wire_.session_id());
    by_session = pin.has_value();
    if (by_session) ApplyPin(*pin, query);
  }
  KEEPSET_ASSIGN_OR_RETURN(const tables::ResolvedTable resolved,
                           tables::ResolveTable(*snapshot_, query));
  spec.table = resolved.table;
  const tables::TableIdentity& identity = spec.table->identity();
  sample_.table = {identity.name, identity.version, identity.digest};
  shadow_ = ChooseShadow(wire_, context_.shadow, *snapshot_, query, spec);
  selection_.set_selection(EncodeSelection(resolved.selection, by_session));
  selection_.set_alias(query.alias);
  selection_.set_loose_match(resolved.loose_match);
  return absl::OkStatus();
}

absl::Status OperationCall::Guarded(absl::FunctionRef<absl::Status()> work) {
  try {
    return work();
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("the server has no memory for this operation now");
  } catch (const std::exception& error) {
    return absl::InternalError(error.what());
  }
}

// Policies that look at no tensor make a large answer out of a small request.
absl::Status OperationCall::CheckReplySize(const engine::OperationSpec& spec) const {
  KEEPSET_ASSIGN_OR_RETURN(const engine::Scope native, context_.policies.NativeScope(spec.policy));
  const bool per_head = spec.scope.value_or(native) == engine::Scope::kKvHead;
  const int64_t sets = spec.model.num_layers * (per_head ? spec.model.num_kv_heads : 1);
  if (sets <= kMaxReplyPositions / spec.seq_len) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(sets, " keep sets of a prompt of ", spec.seq_len,
                                                 ", want at most ", kMaxReplyPositions,
                                                 " positions in one operation"));
}

absl::Status OperationCall::BeginOperation() {
  KEEPSET_ASSIGN_OR_RETURN(engine::OperationSpec spec, DecodeSpec(wire_, context_.codec));
  KEEPSET_RETURN_IF_ERROR(CheckReplySize(spec));
  KEEPSET_RETURN_IF_ERROR(ResolveTable(spec));
  if (wire_.deadline_ms() > 0) {
    spec.deadline = arrival_ + absl::Milliseconds(wire_.deadline_ms());
  }
  // A worker goes on with its own cache: the device's memory is the server's affair.
  spec.on_short_memory = engine::OnShortMemory::kKeepFull;
  sample_.input_tokens = spec.seq_len * spec.model.num_layers;
  KEEPSET_ASSIGN_OR_RETURN(operation_, engine::Operation::Begin(std::move(spec), context_.policies,
                                                                context_.backend, context_.clock));
  return absl::OkStatus();
}

absl::StatusOr<DecodedLayer> OperationCall::DecodeNext(const v1::LayerInput& wire,
                                                       size_t num_before) {
  if (keeps_messages() && wire.layer() > num_before) return MissingForGather(num_before);
  return DecodeLayer(wire, operation_->spec(), wire_.gather(), wire_.block_table(), leases_);
}

absl::Status OperationCall::ObserveLayers(absl::Span<const v1::LayerInput* const> layers) {
  std::vector<DecodedLayer> decoded;
  std::vector<engine::ObservedLayer> observed;
  absl::Status undecoded;
  for (const v1::LayerInput* const wire : layers) {
    absl::StatusOr<DecodedLayer> layer = DecodeNext(*wire, layers_.size() + decoded.size());
    if (!layer.ok()) {
      // What is wrong with the layers before comes first.
      undecoded = std::move(layer).status();
      break;
    }
    observed.push_back({wire->layer(), layer->observation});
    decoded.push_back(*std::move(layer));
  }
  KEEPSET_RETURN_IF_ERROR(operation_->ObserveLayers(observed));
  KEEPSET_RETURN_IF_ERROR(undecoded);
  if (keeps_messages()) {
    std::move(decoded.begin(), decoded.end(), std::back_inserter(layers_));
  }
  return absl::OkStatus();
}

bool OperationCall::EarlyResult(int64_t layer, v1::LayerResult* out) const {
  const engine::LayerResult* result = operation_->EarlyResult(layer);
  if (result == nullptr) return false;
  EncodeLayer(layer, *result, operation_->spec().seq_len, out);
  return true;
}

absl::Status OperationCall::FinishOperation(v1::OperationResult* out) {
  KEEPSET_ASSIGN_OR_RETURN(const engine::OperationResult* result, operation_->Finish());
  if (keeps_messages() && layers_.size() < result->layers.size()) {
    return MissingForGather(layers_.size());
  }
  const absl::Duration start = context_.clock.Monotonic();
  EncodeInto(*result, out);
  reply_time_ = context_.clock.Monotonic() - start;
  // A kept_full answer moves nothing: the caller's own cache is it, whatever the destination holds.
  if (keeps_messages() && result->outcome == engine::Outcome::kCompressed) {
    const absl::Status gathered = GatherLayers(*result, out);
    const bool has_failed = !context_.backend.Health().ok();
    if (!gathered.ok() && !is_moving_ && (has_failed || operation_->is_short_of_memory())) {
      // Destinations hold nothing of use; the caller's own cache does.
      out->Clear();
      EncodeInto(operation_->FinishKeptFull(has_failed ? engine::Reason::kDeviceFault
                                                       : engine::Reason::kShed),
                 out);
      ReleaseResources();
      return absl::OkStatus();
    }
    KEEPSET_RETURN_IF_ERROR(gathered);
    // The engine adds each gather to its result.
    sample_.stages[static_cast<int>(Stage::kGather)] = result->times.gather;
    out->mutable_stages()->set_gather(absl::ToDoubleSeconds(result->times.gather));
  }
  FinishShadow(out);
  ReleaseResources();
  return absl::OkStatus();
}

// In the reply when the request asked for it, else beside the reply.
void OperationCall::FinishShadow(v1::OperationResult* out) {
  if (!shadow_.has_value()) return;
  absl::StatusOr<std::unique_ptr<engine::ShadowDecision>> decision = nullptr;
  if (shadow_->ok()) {
    decision = operation_->TakeShadow();
  } else {
    decision = *shadow_;
  }
  const bool in_reply = wire_.has_shadow_table();
  if (!decision.ok()) {
    context_.shadows.RecordFailed(decision.status());
    if (in_reply) out->mutable_shadow()->set_error(PublicText(decision.status()));
  } else if (*decision == nullptr) {
    context_.shadows.RecordSkipped();
    if (in_reply) out->mutable_shadow()->set_error("nothing was decided, the full cache stays");
  } else if (!in_reply) {
    context_.shadows.FinishLater(*std::move(decision));
  } else {
    const absl::StatusOr<engine::ShadowReport> report = context_.shadows.FinishNow(**decision);
    v1::ShadowResult* const shadow = out->mutable_shadow();
    if (!report.ok()) {
      shadow->set_error(PublicText(report.status()));
      return;
    }
    shadow->mutable_table()->set_name(report->table.name);
    shadow->mutable_table()->set_version(report->table.version);
    shadow->mutable_table()->set_digest(report->table.digest);
    shadow->set_kept_overlap(report->kept_overlap);
    shadow->set_would_be_bytes(report->would_be_bytes);
  }
}

std::string OperationCall::PublicText(const absl::Status& status) const {
  return std::string(PublicStatus(status, correlation_id_).message());
}

absl::Status OperationCall::ShedOperation(v1::OperationResult* out) {
  if (operation_ == nullptr) KEEPSET_RETURN_IF_ERROR(BeginOperation());
  EncodeInto(operation_->FinishKeptFull(engine::Reason::kShed), out);
  ReleaseResources();
  return absl::OkStatus();
}

void OperationCall::EncodeInto(const engine::OperationResult& result, v1::OperationResult* out) {
  transport_ = leases_.Transport();
  EncodeResult(result, out);
  if (out->has_table()) out->mutable_table()->MergeFrom(selection_);
  if (const auto left_out = LayersLeftOut(wire_); left_out.ok()) {
    out->mutable_layers_left_out()->Add(left_out->begin(), left_out->end());
  }
  out->set_transport(transport_);
  out->mutable_stages()->set_queue(absl::ToDoubleSeconds(queue_time_));
  out->mutable_stages()->set_lease(absl::ToDoubleSeconds(LeaseTime()));
  sample_.policy = result.policy;
  sample_.outcome = std::string(engine::OutcomeName(result.outcome));
  sample_.reason = std::string(engine::ReasonName(result.reason));
  sample_.kept_tokens = KeptTokens(result);
  sample_.bytes_before = result.bytes_before;
  sample_.bytes_after = result.bytes_after;
  sample_.entropy_bin = result.entropy_bin;
  sample_.ppl_bin = result.ppl_bin;
  sample_.defaulted_inputs = result.defaulted_inputs;
  sample_.stages[static_cast<int>(Stage::kScore)] = result.times.score;
  sample_.stages[static_cast<int>(Stage::kSelect)] = result.times.select;
}

void OperationCall::ReleaseResources() {
  layers_.clear();
  operation_.reset();
  leases_.Release();
}

absl::Status OperationCall::End(const absl::Status& status) {
  if (ended_) return absl::OkStatus();
  ended_ = true;
  ReleaseResources();
  absl::Status seen = PublicStatus(status, correlation_id_);
  if (!status.ok() && is_moving_) {
    seen = absl::DataLossError(
        absl::StrCat("K and V were being moved in place when the operation failed: compute them "
                     "again; correlation id ",
                     correlation_id_));
  }
  if (!status.ok()) {
    sample_.outcome = absl::IsCancelled(status) ? "cancelled" : "error";
    sample_.reason = absl::StatusCodeToString(status.code());
    sample_.kept_tokens = sample_.bytes_before = sample_.bytes_after = 0;
    sample_.entropy_bin.reset();
    RecordReject(status);
  }
  sample_.stages[static_cast<int>(Stage::kQueue)] = queue_time_;
  sample_.stages[static_cast<int>(Stage::kLease)] = LeaseTime();
  sample_.stages[static_cast<int>(Stage::kReply)] = reply_time_;
  context_.metrics.RecordOperation(sample_);
  context_.totals.Record(sample_, wire_.session_id());
  WriteLogLine(status);
  ticket_ = Admission::Ticket();
  return seen;
}

void OperationCall::RecordReject(const absl::Status& status) {
  absl::MutexLock lock(&reader_mutex_);
  if (!reject_.has_value()) {
    switch (status.code()) {
      case absl::StatusCode::kInvalidArgument:
        reject_ = Reject::kInvalid;
        break;
      case absl::StatusCode::kNotFound:
        reject_ = Reject::kNotFound;
        break;
      case absl::StatusCode::kFailedPrecondition:
        reject_ = Reject::kPrecondition;
        break;
      case absl::StatusCode::kAborted:
        reject_ = Reject::kFence;
        break;
      case absl::StatusCode::kResourceExhausted:
        reject_ = Reject::kNoMemory;
        break;
      default:
        return;
    }
  }
  context_.metrics.RecordReject(*reject_);
}

void OperationCall::WriteLogLine(const absl::Status& status) {
  const auto stage = [this](Stage s) { return Milliseconds(sample_.stages[static_cast<int>(s)]); };
  LogFields fields = {
      {"method", info_.method},
      {"request_id", ToText(wire_.request_id(), kMaxLoggedText)},
      {"policy", ToText(wire_.policy(), kMaxLoggedText)},
      {"outcome", sample_.outcome},
      {"reason", sample_.reason},
      {"tokens_in", absl::StrCat(sample_.input_tokens)},
      {"tokens_kept", absl::StrCat(sample_.kept_tokens)},
      {"bytes_before", absl::StrCat(sample_.bytes_before)},
      {"bytes_after", absl::StrCat(sample_.bytes_after)},
      {"queue_ms", stage(Stage::kQueue)},
      {"lease_ms", stage(Stage::kLease)},
      {"score_ms", stage(Stage::kScore)},
      {"select_ms", stage(Stage::kSelect)},
      {"gather_ms", stage(Stage::kGather)},
      {"reply_ms", stage(Stage::kReply)},
      {"total_ms", Milliseconds(context_.clock.Monotonic() - arrival_)},
      {"transport", transport_},
      {"correlation_id", correlation_id_},
  };
  if (sample_.table.has_value()) {
    fields.emplace_back("table", absl::StrCat(sample_.table->name, "@", sample_.table->version));
    if (selection_.selection() == v1::TABLE_SELECTION_CANARY) fields.emplace_back("canary", "1");
  }
  if (info_.trace.has_value()) {
    fields.emplace_back("trace_id", info_.trace->trace_id);
    fields.emplace_back("span_id", info_.trace->span_id);
  }
  if (!status.ok()) {
    fields.emplace_back("error", ToText(status.message(), kMaxLoggedError));
  }
  const bool our_fault = absl::IsInternal(status) || absl::IsUnknown(status);
  context_.log.Write(our_fault ? LogSeverity::kError : LogSeverity::kInfo, "operation", fields);
}

}  // namespace keepset::service
