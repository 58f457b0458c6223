/* libkeepset: KV-cache retention in process, as a C ABI.
 *
 *   keepset_engine -> keepset_operation_begin -> observe(0..L-1) or observe_layers -> finish ->
 * result, gather
 *
 * Conventions
 *  - Functions return a keepset_status; 0 is success. keepset_last_error() gives this thread's
 * message of the last failed call: where, the value, what would be right.
 *  - Structs start with struct_size, set by the caller to sizeof; later versions append fields
 * only.
 *  - Strides are in elements; the innermost dimension has stride 1. Shapes stand beside each field.
 *  - Pointers inside structs are borrowed for the duration of the call; returned strings and arrays
 *    belong to the object they came from and live as long as it does.
 *  - A keepset_engine and a keepset_table may be used from many threads; an operation from one at a
 * time.
 *  - JSON in and out follows the project's file formats.
 */
#ifndef KEEPSET_ENGINE_KEEPSET_H_
#define KEEPSET_ENGINE_KEEPSET_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define KEEPSET_ABI_VERSION 1

/* Canonical codes, the numbers of gRPC. */
typedef enum keepset_status {
  KEEPSET_OK = 0,
  KEEPSET_CANCELLED = 1,
  KEEPSET_UNKNOWN = 2,
  KEEPSET_INVALID_ARGUMENT = 3,
  KEEPSET_DEADLINE_EXCEEDED = 4,
  KEEPSET_NOT_FOUND = 5,
  KEEPSET_ALREADY_EXISTS = 6,
  KEEPSET_PERMISSION_DENIED = 7,
  KEEPSET_RESOURCE_EXHAUSTED = 8,
  KEEPSET_FAILED_PRECONDITION = 9,
  KEEPSET_ABORTED = 10,
  KEEPSET_OUT_OF_RANGE = 11,
  KEEPSET_UNIMPLEMENTED = 12,
  KEEPSET_INTERNAL = 13,
  KEEPSET_UNAVAILABLE = 14,
  KEEPSET_DATA_LOSS = 15
} keepset_status;

typedef enum keepset_dtype { KEEPSET_F32 = 1, KEEPSET_F16 = 2, KEEPSET_BF16 = 3 } keepset_dtype;

typedef enum keepset_budget_kind {
  KEEPSET_BUDGET_TABLE_DEFAULT = 0,
  KEEPSET_BUDGET_TOKENS = 1,        /* positions per layer */
  KEEPSET_BUDGET_KEPT_FRACTION = 2, /* floor(T * fraction), at least 1 */
  KEEPSET_BUDGET_BYTES = 3          /* bytes per layer */
} keepset_budget_kind;

typedef struct keepset_engine keepset_engine;
typedef struct keepset_table keepset_table;
typedef struct keepset_operation keepset_operation;
typedef struct keepset_result keepset_result;
typedef struct keepset_capture keepset_capture;

int keepset_abi_version(void);
const char* keepset_version(void);
/* Never NULL; empty after a success. Valid until this thread's next call. */
const char* keepset_last_error(void);

/* ---- Engine -------------------------------------------------------------------------------------
 */

typedef struct keepset_engine_options {
  size_t struct_size;
  const char* backend; /* NULL: "cpu" */
  int32_t num_threads; /* 0: all cores this process may use */
  /* Of backend "cuda": NULL or "portable", "hopper" (sm_90 only), or "cublas" (where cuBLAS can be
   * loaded). struct_size may end before. */
  const char* window_kernels;
  /* Of backend "cuda": device memory for operations, at least 512 KiB, with window_kernels
   * "cublas" 4.5 MiB. It is allocated now, or is device_memory, and no more is ever allocated but
   * by cuBLAS for its handle and kernels; an operation that finds no room ends with
   * KEEPSET_RESOURCE_EXHAUSTED. 0: it grows as operations need it. struct_size may end before. */
  int64_t device_memory_bytes;
  /* NULL, or so many bytes of memory of the engine's device at a multiple of 256; they stay the
   * caller's and outlive the engine. */
  void* device_memory;
} keepset_engine_options;

keepset_status keepset_engine_create(const keepset_engine_options* options, keepset_engine** out);
void keepset_engine_destroy(keepset_engine* engine);
/* "cpu/avx512". */
const char* keepset_engine_backend(const keepset_engine* engine);
/* Newline-separated policy names. */
const char* keepset_engine_policies(const keepset_engine* engine);
/* Multiply-add peak of the backend in GFLOP/s, measured now (about 0.2 s). */
keepset_status keepset_engine_measure_peak(keepset_engine* engine, double* out_gflops);

/* ---- Tables -------------------------------------------------------------------------------------
 */

keepset_status keepset_table_load(const char* path, keepset_table** out);
void keepset_table_destroy(keepset_table* table);
const char* keepset_table_name(const keepset_table* table);
const char* keepset_table_version(const keepset_table* table);
const char* keepset_table_digest(const keepset_table* table); /* "sha256:<hex>" */
const char* keepset_table_kind(const keepset_table* table);
/* One JSON document: identity, kind, fingerprint, provenance, tensors with shape and range,
 * budgets, bins, ignored keys. */
const char* keepset_table_inspect(const keepset_table* table);
/* Newline-separated differences, empty when equal. The text belongs to `a` until its next diff. */
keepset_status keepset_table_diff(keepset_table* a, const keepset_table* b, const char** out);

/* How two tables decide differently: a JSON document with the correlation of the head rankings per
 * layer and the head weights and gates that changed, largest first; null where the tables cannot be
 * compared. The text belongs to `a` until its next comparison. */
keepset_status keepset_table_compare(keepset_table* a, const keepset_table* b, const char** out);
/* The values of a tensor that keepset_table_inspect lists, row-major; they belong to the table.
 * NOT_FOUND for another name. */
keepset_status keepset_table_values(const keepset_table* table, const char* tensor,
                                    const float** values, size_t* count);

/* Writes a table file with one head weight and one gate everywhere, provenance "uniform".
 * model_json: a model fingerprint; budgets may be NULL (any budget). */
keepset_status keepset_table_write_uniform(const char* path, const char* name, const char* version,
                                           const char* model_json, float head_weight, float gate,
                                           const int64_t* budgets, size_t num_budgets);

/* One observation of an observation_heads table; rows: 0 last row, 1 largest and 2 mean over the
 * observed rows, 3 largest and 4 mean over the probe's rows, 5 key novelty (head is a KV head). */
typedef struct keepset_head_observation {
  int32_t layer;
  int32_t head;
  int32_t rows;
  float weight;
} keepset_head_observation;

/* Writes an observation_heads table by hand, provenance "hand-written", without a probe. */
keepset_status keepset_table_write_heads(const char* path, const char* name, const char* version,
                                         const char* model_json,
                                         const keepset_head_observation* observations,
                                         size_t num_observations, int64_t pool_kernel,
                                         int64_t dilate);

/* Imports a reference directory (manifest.json, W_head.npy, T_gate.npy) into a table file.
 * budget: 0 when the directory states its budgets. */
keepset_status keepset_table_import(const char* directory, const char* model_json, const char* name,
                                    const char* version, int64_t budget, const char* out_path);

/* Ed25519 signatures of table files. Sign writes `path`.sig, 64 bytes; key_path: PEM of a private
 * key. Verify reads it, against the PEM of one or more public keys: PERMISSION_DENIED when none of
 * them made it for these bytes. */
keepset_status keepset_table_sign(const char* path, const char* key_path);
keepset_status keepset_table_verify(const char* path, const char* public_key_path);

/* ---- Views of the caller's tensors
 * --------------------------------------------------------------- */

/* K or V of one layer: logical [num_kv_heads, seq_len, head_dim]. Paged when block_size > 0:
 * element (g, t, c) = data[block_table[t / block_size] * block_stride + (t % block_size) *
 * token_stride
 * + g * head_stride + c]. */
typedef struct keepset_kv_view {
  void* data;         /* read only, except as a destination */
  int64_t size_bytes; /* readable (writable) bytes from data */
  int32_t dtype;      /* keepset_dtype */
  int32_t reserved;
  int64_t num_kv_heads;
  int64_t seq_len; /* capacity in tokens for a destination */
  int64_t head_dim;
  int64_t head_stride;
  int64_t token_stride;
  int64_t block_size;
  int64_t block_stride;
  const int32_t* block_table; /* [num_blocks] */
  int64_t num_blocks;
} keepset_kv_view;

/* Queries [num_qo_heads, num_rows, head_dim], attention tile [num_qo_heads, num_rows, seq_len] or
 * log-sum-exp [num_qo_heads, num_rows] (last_dim 1). data NULL: absent. */
typedef struct keepset_rows_view {
  const void* data;
  int64_t size_bytes;
  int32_t dtype;
  int32_t reserved;
  int64_t num_qo_heads;
  int64_t num_rows;
  int64_t last_dim;
  int64_t head_stride;
  int64_t row_stride;
} keepset_rows_view;

/* What column statistics hold of the attention of the num_rows observed rows. */
typedef enum keepset_column_reduction {
  KEEPSET_COLUMN_MEAN = 1, /* sum over the rows divided by num_rows */
  KEEPSET_COLUMN_SUM = 2
} keepset_column_reduction;

/* Of the logarithm in a log-sum-exp. */
typedef enum keepset_lse_base { KEEPSET_LSE_BASE_E = 0, KEEPSET_LSE_BASE_2 = 1 } keepset_lse_base;

typedef struct keepset_layer_observation {
  size_t struct_size;
  keepset_rows_view q_window;
  keepset_rows_view window_lse;
  keepset_rows_view attn_tile;
  keepset_kv_view k;
  keepset_kv_view v;
  /* [num_qo_heads, seq_len] (num_rows 1, last_dim seq_len), instead of q_window and attn_tile; for
   * policies that keepset_input_needs says "columns" of. */
  keepset_rows_view column_stats;
  int32_t column_reduction; /* keepset_column_reduction */
  int32_t lse_base;         /* keepset_lse_base, of window_lse */
  /* Ascending query heads that q_window, window_lse and attn_tile hold, their num_qo_heads many;
   * for policies that keepset_input_needs lists "qo_heads" of. NULL: all of the model's. */
  const int64_t* qo_heads;
} keepset_layer_observation;

/* ---- Operations
 * ---------------------------------------------------------------------------------- */

typedef struct keepset_parameter {
  const char* name;
  const char* value;
} keepset_parameter;

typedef struct keepset_span {
  const char* name; /* may be NULL */
  int64_t begin;
  int64_t end; /* exclusive */
} keepset_span;

typedef struct keepset_operation_spec {
  size_t struct_size;
  const char* model_json; /* model fingerprint */
  int64_t seq_len;
  int64_t num_rows;             /* observed rows W */
  const int64_t* row_positions; /* [num_rows] or NULL: the last W */
  float softmax_scale;
  int32_t kv_dtype;       /* keepset_dtype */
  int64_t value_head_dim; /* 0: head_dim */
  const char* policy;
  const keepset_parameter* parameters;
  size_t num_parameters;
  int32_t budget_kind; /* keepset_budget_kind */
  int64_t budget;      /* tokens or bytes */
  double kept_fraction;
  const char* scope; /* NULL: the policy's native scope */
  int64_t protect_sink;
  int64_t protect_window;
  const keepset_span* protect_spans;
  size_t num_protect_spans;
  double ppl;                   /* NaN: not given */
  const float* window_logprobs; /* [num_window_logprobs] or NULL */
  size_t num_window_logprobs;
  const keepset_table* table; /* NULL: none; kept by reference until the operation is destroyed */
  int32_t shadow;             /* 1: decide and report, never apply */
  /* Of backend "cuda": a cudaStream_t of its device, which stays the caller's, alive and out of
   * capture until the operation is destroyed; cudaStreamLegacy for the default stream, not
   * cudaStreamPerThread. Kernels are queued behind what the caller queued there; calls return when
   * the stream has done what they queued. NULL: one of the engine's own, which waits for no other,
   * the default stream included: tensors are complete before the call. struct_size may end before.
   */
  void* cuda_stream;
  /* 1: an operation for which there is no device memory ends with outcome kept_full, reason shed,
   * not with KEEPSET_RESOURCE_EXHAUSTED. A gather still ends so; the caller's cache is whole, and
   * the result is kept_full, reason shed, from then on, unless rows of another layer have moved in
   * place. struct_size may end before. */
  int32_t keep_full_on_short_memory;
  int32_t reserved;
} keepset_operation_spec;

/* How the caller will hand over layers, observed ones and such whose rows move. */
typedef enum keepset_handover {
  KEEPSET_LAYERS_TOGETHER = 0,  /* all with one call */
  KEEPSET_LAYERS_ONE_BY_ONE = 1 /* takes less, and more time */
} keepset_handover;

/* What it will do with the rows that are kept. */
typedef enum keepset_row_move {
  KEEPSET_ROWS_GATHERED = 0, /* into tensors of the layout they come from */
  KEEPSET_ROWS_IN_PLACE = 1,
  KEEPSET_ROWS_STAY = 2 /* positions are all that is wanted */
} keepset_row_move;

typedef struct keepset_device_bytes_options {
  size_t struct_size;
  int32_t handover; /* keepset_handover */
  int32_t row_move; /* keepset_row_move */
  /* What every layer brings, with all heads (qo_heads NULL). Only sizes, strides and block tables
   * are looked at: data is any address that is not NULL and aligned. NULL: queries of kv_dtype, K
   * and V in pages of 16 tokens, no window_lse. */
  const keepset_layer_observation* layer;
} keepset_device_bytes_options;

/* How many bytes of device memory of a fixed size (keepset_engine_options.device_memory_bytes) one
 * operation of `spec` runs in, alone, with its tensors in device memory; a multiple of 256. With
 * less it goes slower, or ends with KEEPSET_RESOURCE_EXHAUSTED. Nothing is queued, and no tensor is
 * read: an operation is gone through that only counts. options NULL: all 0. 0: the engine's
 * operations take none. Errors: those of the operation. */
keepset_status keepset_operation_device_bytes(keepset_engine* engine,
                                              const keepset_operation_spec* spec,
                                              const keepset_device_bytes_options* options,
                                              int64_t* out);
keepset_status keepset_operation_begin(keepset_engine* engine, const keepset_operation_spec* spec,
                                       keepset_operation** out);
keepset_status keepset_operation_observe(keepset_operation* operation, int64_t layer,
                                         const keepset_layer_observation* observation);
/* Observe of layers[i] with observations[i], for every i in order: the same keep sets and errors.
 * On a GPU layers share launches and waits, so hand over all that are at hand. When a layer is
 * refused those before it are observed. */
keepset_status keepset_operation_observe_layers(
    keepset_operation* operation, const int64_t* layers,
    const keepset_layer_observation* const* observations, size_t num_layers);
/* The result belongs to the operation. */
keepset_status keepset_operation_finish(keepset_operation* operation, const keepset_result** out);
/* Moves the kept rows of one layer, bit for bit; k and v stay as they are. When the device fails,
 * and where keep_full_on_short_memory says so, an error makes the result kept_full: read it again.
 * What was borrowed of it before stays valid until the operation is destroyed. */
keepset_status keepset_operation_gather(keepset_operation* operation, int64_t layer,
                                        const keepset_kv_view* k, const keepset_kv_view* v,
                                        const keepset_kv_view* out_k, const keepset_kv_view* out_v);
/* The same within k and v: kept rows move to the front, rows behind them stay; nothing moves with
 * outcome kept_full. k and v must not share bytes. KEEPSET_INVALID_ARGUMENT,
 * KEEPSET_FAILED_PRECONDITION and KEEPSET_RESOURCE_EXHAUSTED: nothing of the layer has moved; after
 * any other error the layer's cache is lost. Once rows of a layer have moved, no error makes the
 * result kept_full. */
keepset_status keepset_operation_gather_in_place(keepset_operation* operation, int64_t layer,
                                                 const keepset_kv_view* k,
                                                 const keepset_kv_view* v);
/* Takes the engine's memory for gather_in_place of these layers until the operation is destroyed:
 * none of them ends with KEEPSET_RESOURCE_EXHAUSTED then, so that all layers move, or none. Moves
 * nothing; refuses what gather_in_place refuses. After KEEPSET_RESOURCE_EXHAUSTED keep the full
 * cache, or try again later. */
typedef struct keepset_layer_in_place {
  size_t struct_size;
  int64_t layer;
  const keepset_kv_view* k;
  const keepset_kv_view* v;
} keepset_layer_in_place;
keepset_status keepset_operation_reserve_in_place(keepset_operation* operation,
                                                  const keepset_layer_in_place* const* layers,
                                                  size_t num_layers);
/* Gather of several layers, together on a GPU. No destination overlaps a source or another
 * destination. */
typedef struct keepset_layer_gather {
  size_t struct_size;
  int64_t layer;
  const keepset_kv_view* k;
  const keepset_kv_view* v;
  const keepset_kv_view* out_k;
  const keepset_kv_view* out_v;
} keepset_layer_gather;
keepset_status keepset_operation_gather_layers(keepset_operation* operation,
                                               const keepset_layer_gather* const* layers,
                                               size_t num_layers);
void keepset_operation_destroy(keepset_operation* operation);

/* One JSON document that a call answers with. */
typedef struct keepset_report keepset_report;
const char* keepset_report_json(const keepset_report* report);
void keepset_report_destroy(keepset_report* report);

/* What a worker has to send for `spec`, of which model_json, policy, parameters and table are
 * looked at: {"layers": [{"layer", "queries", "keys", "values", "columns", "qo_heads",
 * "kv_heads"}], "rows": [..], "max_rows", "ppl", "probe"}. Empty head lists mean all heads; layers
 * that are not listed may be left out. "columns": column_stats serve instead of queries and keys.
 * "max_rows": the last of the observed rows that are read, and the most column_stats may stand for;
 * 0: all. */
keepset_status keepset_input_needs(keepset_engine* engine, const keepset_operation_spec* spec,
                                   keepset_report** out);

/* "compressed", "kept_full", "shadow". */
const char* keepset_result_outcome(const keepset_result* result);
const char* keepset_result_reason(const keepset_result* result);
/* The JSON document of a result file. */
const char* keepset_result_json(const keepset_result* result);
int64_t keepset_result_num_layers(const keepset_result* result);
/* 1 for a shared set, the number of KV heads in scope kv_head. */
int64_t keepset_result_num_sets(const keepset_result* result);
/* Ascending positions of one set; borrowed from the result. */
keepset_status keepset_result_keep_indices(const keepset_result* result, int64_t layer, int64_t set,
                                           const int32_t** out, int64_t* out_count);
/* Seconds spent in one stage of this operation: "score", "select", "gather". */
double keepset_result_stage_seconds(const keepset_result* result, const char* stage);

/* ---- Captures and result files
 * ------------------------------------------------------------------- */

keepset_status keepset_capture_open(const char* path, keepset_capture** out);
void keepset_capture_close(keepset_capture* capture);
/* The capture's JSON document. */
const char* keepset_capture_json(const keepset_capture* capture);
/* Fills what the capture states: model, seq_len, rows, softmax_scale, dtypes, ppl,
 * log-probabilities. Policy, budget, scope and protection stay as they are; pointers belong to the
 * capture. */
keepset_status keepset_capture_fill_spec(const keepset_capture* capture,
                                         keepset_operation_spec* spec);
/* Span `name` of the capture; NOT_FOUND lists the names. */
keepset_status keepset_capture_span(const keepset_capture* capture, const char* name,
                                    keepset_span* out);
/* Layer `layer` as the capture states it; what it does not state is cleared, as far as
 * out->struct_size goes. Pointers belong to the capture. */
keepset_status keepset_capture_layer(const keepset_capture* capture, int64_t layer,
                                     keepset_layer_observation* out);

/* Compacted K and V of one layer for a result file: shared sets [num_kv_heads, n, head_dim] (set =
 * -1), or one KV head's [n, head_dim] (set = head). Bytes in the capture's dtype, contiguous. */
typedef struct keepset_gathered_layer {
  int64_t layer;
  int64_t set;
  int32_t dtype;
  int32_t reserved;
  int64_t num_kv_heads; /* 1 with set >= 0 */
  int64_t num_tokens;
  int64_t k_head_dim;
  int64_t v_head_dim;
  const void* k;
  const void* v;
} keepset_gathered_layer;

/* One set of keep indices of a result that was computed elsewhere (a server). */
typedef struct keepset_index_set {
  int64_t layer;
  int64_t set; /* -1 for a shared set */
  const int32_t* indices;
  int64_t count;
} keepset_index_set;

/* Writes a result file (temporary name, sync, rename); a failure leaves no file. */
keepset_status keepset_result_write(const char* path, const char* result_json,
                                    const keepset_index_set* sets, size_t num_sets,
                                    const keepset_gathered_layer* gathered, size_t num_gathered);

/* ---- Compiling tables
 * ---------------------------------------------------------------------------- */

/* Bytes read so far and bytes of all files; from any thread, one call at a time. */
typedef void (*keepset_progress)(void* user, int64_t bytes_done, int64_t bytes_total);

/* Values a table entry may take: first + step * i, i = 0..count-1. count 0: the paper's, 0.8..1.5
 * in steps of 0.025 for heads and 0.8..1.0 in steps of 0.01 for gates. */
typedef struct keepset_action_grid {
  double first;
  double step;
  int32_t count;
  int32_t reserved;
} keepset_action_grid;

typedef struct keepset_compile_options {
  size_t struct_size;
  const char* const* record_paths; /* [num_record_paths], JSON lines */
  size_t num_record_paths;
  const char* model_json; /* model fingerprint */
  const char* name;
  const char* version;
  const char* out_path;         /* table file to write */
  const char* solver;           /* "exact" (NULL) or "adam" */
  double conservative_weight;   /* NaN: 0.75 */
  int64_t entropy_bins;         /* 0: 20 */
  int64_t ppl_bins;             /* 0: 4 */
  int64_t default_budget;       /* 0: none */
  int64_t max_rejected;         /* bad records that are counted before one is an error */
  int64_t created_unix_seconds; /* written to the file; 0: now */
  int32_t num_threads;          /* 0: all cores this process may use */
  int32_t independent_records;  /* 1: records without paired_policy are taken */
  int32_t compare_solvers;      /* 1: both solvers, the report says where they differ */
  int32_t reserved;
  keepset_action_grid head_actions;
  keepset_action_grid gate_actions;
  keepset_progress progress; /* may be NULL */
  void* progress_user;
} keepset_compile_options;

/* Compiles calibration records to a table file; a failure leaves no file. `out` may be NULL. */
keepset_status keepset_table_compile(const keepset_compile_options* options, keepset_report** out);

typedef struct keepset_compile_heads_options {
  size_t struct_size;
  const char* const* record_paths; /* [num_record_paths], observation records */
  size_t num_record_paths;
  const char* name;
  const char* version;
  const char* out_path; /* table file to write */
  const int64_t* budgets;
  size_t num_budgets;
  const int64_t* pool_kernels; /* NULL: 1, 5 */
  size_t num_pool_kernels;
  const int64_t* dilations; /* NULL: 0, 4, 12 */
  size_t num_dilations;
  int64_t max_heads;            /* 0: 16 */
  int64_t num_heads;            /* 0: validated */
  int64_t num_folds;            /* 0: 4 */
  int64_t default_budget;       /* 0: none */
  int64_t created_unix_seconds; /* written to the file; 0: now */
  int32_t num_threads;          /* 0: all cores this process may use */
  int32_t reserved;
  keepset_progress progress; /* steps done and steps of all; may be NULL */
  void* progress_user;
} keepset_compile_heads_options;

/* Compiles observation records to an observation_heads table file; a failure leaves no file. `out`
 * may be NULL. */
keepset_status keepset_table_compile_heads(const keepset_compile_heads_options* options,
                                           keepset_report** out);

/* What record files hold: counts per state and action, coverage of the risk cells, rejections. Uses
 * record_paths, bins, actions, num_threads and progress of the options. */
keepset_status keepset_records_summarize(const keepset_compile_options* options,
                                         keepset_report** out);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* KEEPSET_ENGINE_KEEPSET_H_ */
