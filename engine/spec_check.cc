#include "engine/spec_check.h"

#include <cmath>
#include <cstddef>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace keepset::engine {
namespace {

// With these, bytes of K and V of a whole prompt stay below 2^63, and a position is exact as fp32.
constexpr int64_t kMaxSeqLen = int64_t{1} << 24;
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxHeads = 4096;
constexpr int64_t kMaxHeadDim = 8192;
// Keep indices of one result: 8 GiB of 32-bit positions.
constexpr int64_t kMaxPositions = int64_t{1} << 31;
// Attention of one layer, one fp32 per query head and position: 2 GiB. Stating heads and length
// takes a few bytes, so their product is bounded before any tensor arrives.
constexpr int64_t kMaxColumns = int64_t{1} << 29;

absl::Status InRange(absl::string_view name, int64_t value, int64_t min, int64_t max) {
  if (value >= min && value <= max) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, "=", value, ", want ", min, "..", max));
}

absl::Status Equal(absl::string_view what, absl::string_view name, int64_t value, int64_t want) {
  if (value == want) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(what, ": ", name, "=", value, ", want ", want));
}

absl::Status KnownDType(absl::string_view what, kernels::DType dtype) {
  if (dtype == kernels::DType::kF32 || dtype == kernels::DType::kF16 ||
      dtype == kernels::DType::kBF16) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat(what, ": dtype ", static_cast<int>(dtype), ", want f32, f16 or bf16"));
}

absl::Status CheckHeadList(const OperationSpec& spec, const Requirements& needs,
                           const LayerObservation& observation, absl::string_view what) {
  const absl::Span<const int64_t> heads = observation.qo_heads;
  if (heads.empty()) return absl::OkStatus();
  if (observation.column_stats.present()) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": given beside column_stats, want all heads there"));
  }
  if (needs.observation && !needs.some_heads) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": policy ", spec.policy, " reads all ",
                                                   spec.model.num_qo_heads,
                                                   " query heads, want none left out"));
  }
  int64_t least = 0;
  for (size_t i = 0; i < heads.size(); ++i) {
    if (heads[i] < least || heads[i] >= spec.model.num_qo_heads) {
      return absl::InvalidArgumentError(absl::StrCat(what, "[", i, "]=", heads[i], ", want ", least,
                                                     "..", spec.model.num_qo_heads - 1,
                                                     " (ascending)"));
    }
    least = heads[i] + 1;
  }
  return absl::OkStatus();
}

// Heads that the layer's tensors hold.
int64_t NumHeads(const OperationSpec& spec, const LayerObservation& observation) {
  return observation.qo_heads.empty() ? spec.model.num_qo_heads
                                      : static_cast<int64_t>(observation.qo_heads.size());
}

absl::Status CheckQueries(const OperationSpec& spec, int64_t num_heads,
                          const kernels::QueryView& view, absl::string_view what) {
  KEEPSET_RETURN_IF_ERROR(KnownDType(what, view.dtype));
  KEEPSET_RETURN_IF_ERROR(Equal(what, "num_qo_heads", view.num_qo_heads, num_heads));
  KEEPSET_RETURN_IF_ERROR(Equal(what, "num_rows", view.num_rows, spec.num_rows));
  KEEPSET_RETURN_IF_ERROR(Equal(what, "head_dim", view.head_dim, spec.model.head_dim));
  return kernels::ValidateView(view, what);
}

absl::Status CheckTile(const OperationSpec& spec, int64_t num_heads, const kernels::TileView& view,
                       absl::string_view what) {
  KEEPSET_RETURN_IF_ERROR(KnownDType(what, view.dtype));
  KEEPSET_RETURN_IF_ERROR(Equal(what, "num_qo_heads", view.num_qo_heads, num_heads));
  KEEPSET_RETURN_IF_ERROR(Equal(what, "num_rows", view.num_rows, spec.num_rows));
  KEEPSET_RETURN_IF_ERROR(Equal(what, "seq_len", view.seq_len, spec.seq_len));
  return kernels::ValidateView(view, what);
}

// Which policies take sums or means over the rows, and of how many rows.
absl::Status CheckColumns(const OperationSpec& spec, const Requirements& needs,
                          const LayerObservation& observation, absl::string_view what) {
  const kernels::ColumnsView& view = observation.column_stats;
  if (observation.attn_tile.present() || observation.q_window.present()) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": given beside ",
                     observation.attn_tile.present() ? "attn_tile" : "q_window", ", want one"));
  }
  KEEPSET_RETURN_IF_ERROR(KnownDType(what, view.dtype));
  KEEPSET_RETURN_IF_ERROR(Equal(what, "num_qo_heads", view.num_qo_heads, spec.model.num_qo_heads));
  KEEPSET_RETURN_IF_ERROR(Equal(what, "seq_len", view.seq_len, spec.seq_len));
  KEEPSET_RETURN_IF_ERROR(kernels::ValidateView(view, what));
  if (!needs.observation) return absl::OkStatus();
  if (!needs.columns) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": policy ", spec.policy,
                     " looks at rows one by one, want q_window with k, or attn_tile"));
  }
  if (needs.max_rows > 0 && spec.num_rows > needs.max_rows) {
    return absl::InvalidArgumentError(absl::StrCat(
        what, ": of num_rows=", spec.num_rows, " rows, policy ", spec.policy, " reads the last ",
        needs.max_rows, ", want statistics of at most these, or q_window with k, or attn_tile"));
  }
  return absl::OkStatus();
}

absl::Status CheckLse(const OperationSpec& spec, int64_t num_heads, const kernels::LseView& view,
                      absl::string_view what) {
  KEEPSET_RETURN_IF_ERROR(Equal(what, "num_qo_heads", view.num_qo_heads, num_heads));
  KEEPSET_RETURN_IF_ERROR(Equal(what, "num_rows", view.num_rows, spec.num_rows));
  if (view.dtype != kernels::DType::kF32 && view.dtype != spec.kv_dtype) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": dtype ", kernels::DTypeName(view.dtype), ", want f32 or ",
                     kernels::DTypeName(spec.kv_dtype), ", the dtype of K"));
  }
  return kernels::ValidateView(view, what);
}

// Row positions lie below it.
int64_t PositionsEnd(const OperationSpec& spec, const Requirements& needs) {
  return spec.seq_len + (needs.probe_rows ? kMaxProbeTokens : 0);
}

}  // namespace

int64_t ValueHeadDim(const OperationSpec& spec) {
  return spec.value_head_dim == 0 ? spec.model.head_dim : spec.value_head_dim;
}

absl::Status CheckShape(const OperationSpec& spec, const Requirements& needs) {
  const tables::ModelFingerprint& model = spec.model;
  KEEPSET_RETURN_IF_ERROR(InRange("num_layers", model.num_layers, 1, kMaxLayers));
  KEEPSET_RETURN_IF_ERROR(InRange("num_qo_heads", model.num_qo_heads, 1, kMaxHeads));
  KEEPSET_RETURN_IF_ERROR(InRange("num_kv_heads", model.num_kv_heads, 1, model.num_qo_heads));
  if (model.num_qo_heads % model.num_kv_heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_qo_heads=", model.num_qo_heads,
                     ", want a multiple of num_kv_heads=", model.num_kv_heads));
  }
  KEEPSET_RETURN_IF_ERROR(InRange("head_dim", model.head_dim, 1, kMaxHeadDim));
  KEEPSET_RETURN_IF_ERROR(InRange("value_head_dim", spec.value_head_dim, 0, kMaxHeadDim));
  KEEPSET_RETURN_IF_ERROR(InRange("seq_len", spec.seq_len, 1, kMaxSeqLen));
  const int64_t positions = model.num_layers * model.num_kv_heads * spec.seq_len;
  if (positions > kMaxPositions) {
    return absl::InvalidArgumentError(absl::StrCat(
        "num_layers x num_kv_heads x seq_len = ", positions, ", want at most ", kMaxPositions));
  }
  const int64_t columns = model.num_qo_heads * spec.seq_len;
  if (needs.observation && columns > kMaxColumns) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_qo_heads x seq_len = ", columns, ", want at most ", kMaxColumns));
  }
  const int64_t most_rows = spec.row_positions.empty() ? spec.seq_len : PositionsEnd(spec, needs);
  KEEPSET_RETURN_IF_ERROR(
      InRange("num_rows (window)", spec.num_rows, needs.observation ? 1 : 0, most_rows));
  if (!std::isfinite(spec.softmax_scale) || spec.softmax_scale < 0.0f) {
    return absl::InvalidArgumentError(
        absl::StrCat("softmax_scale=", spec.softmax_scale, ", want finite and above 0"));
  }
  return KnownDType("kv_dtype", spec.kv_dtype);
}

absl::StatusOr<std::vector<int64_t>> ResolveRowPositions(const OperationSpec& spec,
                                                         const Requirements& needs) {
  const int64_t num_rows = spec.num_rows;
  const int64_t end = PositionsEnd(spec, needs);
  if (spec.row_positions.empty()) {
    std::vector<int64_t> positions(num_rows);
    for (int64_t i = 0; i < num_rows; ++i) positions[i] = spec.seq_len - num_rows + i;
    return positions;
  }
  KEEPSET_RETURN_IF_ERROR(
      Equal("row_positions", "entries", static_cast<int64_t>(spec.row_positions.size()), num_rows));
  for (int64_t i = 0; i < num_rows; ++i) {
    const std::string name = absl::StrCat("row_positions[", i, "]");
    KEEPSET_RETURN_IF_ERROR(InRange(name, spec.row_positions[i], 0, end - 1));
    if (i > 0 && spec.row_positions[i] <= spec.row_positions[i - 1]) {
      return absl::InvalidArgumentError(absl::StrCat(
          name, "=", spec.row_positions[i], ", want ascending, above ", spec.row_positions[i - 1]));
    }
  }
  return spec.row_positions;
}

absl::StatusOr<std::optional<double>> ResolvePerplexity(const OperationSpec& spec) {
  std::optional<double> ppl = spec.ppl;
  if (!ppl.has_value() && !spec.window_logprobs.empty()) {
    double sum = 0.0;
    for (size_t i = 0; i < spec.window_logprobs.size(); ++i) {
      if (!std::isfinite(spec.window_logprobs[i])) {
        return absl::InvalidArgumentError(
            absl::StrCat("window_logprobs[", i, "]=", spec.window_logprobs[i], ", want finite"));
      }
      sum += spec.window_logprobs[i];
    }
    ppl = std::exp(-sum / static_cast<double>(spec.window_logprobs.size()));
  }
  if (ppl.has_value() && !(std::isfinite(*ppl) && *ppl > 0.0)) {
    return absl::InvalidArgumentError(absl::StrCat("ppl=", *ppl, ", want finite and above 0"));
  }
  return ppl;
}

absl::Status CheckKv(const OperationSpec& spec, const kernels::KvView& view, int64_t head_dim,
                     absl::string_view what) {
  KEEPSET_RETURN_IF_ERROR(KnownDType(what, view.dtype));
  if (view.dtype != spec.kv_dtype) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": dtype ", kernels::DTypeName(view.dtype),
                                                   ", want ", kernels::DTypeName(spec.kv_dtype)));
  }
  KEEPSET_RETURN_IF_ERROR(Equal(what, "num_kv_heads", view.num_kv_heads, spec.model.num_kv_heads));
  KEEPSET_RETURN_IF_ERROR(Equal(what, "seq_len", view.seq_len, spec.seq_len));
  KEEPSET_RETURN_IF_ERROR(Equal(what, "head_dim", view.head_dim, head_dim));
  return kernels::ValidateView(view, what);
}

absl::Status CheckObservation(const OperationSpec& spec, const Requirements& needs, int64_t layer,
                              const LayerObservation& observation) {
  const std::string where = absl::StrCat("layer ", layer, ": ");
  const auto missing = [&](absl::string_view input) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, "missing ", input, ", policy ", spec.policy, " needs it"));
  };
  KEEPSET_RETURN_IF_ERROR(CheckHeadList(spec, needs, observation, absl::StrCat(where, "qo_heads")));
  const int64_t num_heads = NumHeads(spec, observation);
  if (observation.column_stats.present()) {
    KEEPSET_RETURN_IF_ERROR(
        CheckColumns(spec, needs, observation, absl::StrCat(where, "column_stats")));
  } else if (needs.observation && !observation.attn_tile.present()) {
    if (!observation.q_window.present()) {
      return missing(needs.columns ? "q_window (or attn_tile, or column_stats)"
                                   : "q_window (or attn_tile)");
    }
    if (!observation.k.present()) return missing("k beside q_window");
    if (spec.softmax_scale == 0.0f) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, "q_window is observed with softmax_scale=0, want above 0"));
    }
  }
  if (needs.keys && !observation.k.present()) return missing("k");
  if (needs.values && !observation.v.present()) return missing("v");

  if (observation.q_window.present()) {
    KEEPSET_RETURN_IF_ERROR(
        CheckQueries(spec, num_heads, observation.q_window, absl::StrCat(where, "q_window")));
  }
  if (observation.attn_tile.present()) {
    KEEPSET_RETURN_IF_ERROR(
        CheckTile(spec, num_heads, observation.attn_tile, absl::StrCat(where, "attn_tile")));
  }
  if (observation.window_lse.present()) {
    KEEPSET_RETURN_IF_ERROR(
        CheckLse(spec, num_heads, observation.window_lse, absl::StrCat(where, "window_lse")));
  }
  if (observation.k.present()) {
    KEEPSET_RETURN_IF_ERROR(
        CheckKv(spec, observation.k, spec.model.head_dim, absl::StrCat(where, "k")));
  }
  if (observation.v.present()) {
    KEEPSET_RETURN_IF_ERROR(
        CheckKv(spec, observation.v, ValueHeadDim(spec), absl::StrCat(where, "v")));
  }
  return absl::OkStatus();
}

absl::Status CheckTable(const OperationSpec& spec, const Requirements& needs) {
  if (needs.table_kind.empty()) return absl::OkStatus();
  if (spec.table == nullptr) {
    return absl::NotFoundError(absl::StrCat("policy ", spec.policy, " needs a table of kind ",
                                            needs.table_kind, ", none given"));
  }
  if (spec.table->kind() != needs.table_kind) {
    return absl::FailedPreconditionError(
        absl::StrCat("policy ", spec.policy, ": table ", spec.table->identity().name,
                     " is of kind ", spec.table->kind(), ", want ", needs.table_kind));
  }
  return absl::OkStatus();
}

}  // namespace keepset::engine
