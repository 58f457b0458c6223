/* keepset.h from plain C: an operation from begin to gather, its errors, and a table file. */
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "engine/keepset.h"

#define NUM_LAYERS 2
#define NUM_QO_HEADS 4
#define NUM_KV_HEADS 2
#define SEQ_LEN 6
#define HEAD_DIM 2
#define BUDGET 3

static const char kModel[] =
    "{\"architecture\": \"PlainC\", \"num_layers\": 2, \"num_qo_heads\": 4, \"num_kv_heads\": 2, "
    "\"head_dim\": 2}";

static int failures = 0;

static void Expect(int condition, const char* what, int line) {
  if (condition) return;
  fprintf(stderr, "line %d: %s; last error: %s\n", line, what, keepset_last_error());
  ++failures;
}
#define EXPECT(condition) Expect((condition), #condition, __LINE__)

static keepset_kv_view View(float* data, int64_t seq_len) {
  keepset_kv_view view;
  memset(&view, 0, sizeof(view));
  view.data = data;
  view.size_bytes = (int64_t)sizeof(float) * NUM_KV_HEADS * seq_len * HEAD_DIM;
  view.dtype = KEEPSET_F32;
  view.num_kv_heads = NUM_KV_HEADS;
  view.seq_len = seq_len;
  view.head_dim = HEAD_DIM;
  view.head_stride = seq_len * HEAD_DIM;
  view.token_stride = HEAD_DIM;
  return view;
}

static keepset_operation_spec Spec(void) {
  keepset_operation_spec spec;
  memset(&spec, 0, sizeof(spec));
  spec.struct_size = sizeof(spec);
  spec.model_json = kModel;
  spec.seq_len = SEQ_LEN;
  spec.kv_dtype = KEEPSET_F32;
  spec.policy = "knorm";
  spec.budget_kind = KEEPSET_BUDGET_TOKENS;
  spec.budget = BUDGET;
  spec.scope = "layer_equal";
  spec.ppl = NAN;
  return spec;
}

/* Keys of growing norm: knorm keeps the first positions. */
static void RunsAndGathers(keepset_engine* engine) {
  float k[NUM_KV_HEADS * SEQ_LEN * HEAD_DIM];
  float v[NUM_KV_HEADS * SEQ_LEN * HEAD_DIM];
  float out_k[NUM_KV_HEADS * BUDGET * HEAD_DIM] = {0};
  float out_v[NUM_KV_HEADS * BUDGET * HEAD_DIM] = {0};
  const keepset_operation_spec spec = Spec();
  keepset_operation* operation = NULL;
  const keepset_result* result = NULL;
  const int32_t* indices = NULL;
  int64_t count = 0;
  keepset_layer_observation observation;
  keepset_kv_view k_view, v_view, out_k_view, out_v_view;
  keepset_layer_in_place in_place;
  const keepset_layer_in_place* const layers[] = {&in_place};
  int layer;
  size_t i;

  for (i = 0; i < sizeof(k) / sizeof(k[0]); ++i) {
    k[i] = 1.0f + (float)((i / HEAD_DIM) % SEQ_LEN);
    v[i] = (float)i;
  }
  k_view = View(k, SEQ_LEN);
  v_view = View(v, SEQ_LEN);
  out_k_view = View(out_k, BUDGET);
  out_v_view = View(out_v, BUDGET);
  EXPECT(keepset_operation_begin(engine, &spec, &operation) == KEEPSET_OK);
  memset(&observation, 0, sizeof(observation));
  observation.struct_size = sizeof(observation);
  observation.k = k_view;
  for (layer = 0; layer < NUM_LAYERS; ++layer) {
    EXPECT(keepset_operation_observe(operation, layer, &observation) == KEEPSET_OK);
  }
  EXPECT(keepset_operation_finish(operation, &result) == KEEPSET_OK);
  EXPECT(strcmp(keepset_result_outcome(result), "compressed") == 0);
  EXPECT(strcmp(keepset_result_reason(result), "none") == 0);
  EXPECT(keepset_result_num_layers(result) == NUM_LAYERS);
  EXPECT(keepset_result_num_sets(result) == 1);
  EXPECT(strstr(keepset_result_json(result), "keepset.result") != NULL);
  EXPECT(keepset_result_keep_indices(result, 1, 0, &indices, &count) == KEEPSET_OK);
  EXPECT(count == BUDGET);
  EXPECT(indices[0] == 0 && indices[1] == 1 && indices[2] == 2);
  EXPECT(keepset_operation_gather(operation, 1, &k_view, &v_view, &out_k_view, &out_v_view) ==
         KEEPSET_OK);
  EXPECT(memcmp(out_k, k, sizeof(float) * BUDGET * HEAD_DIM) == 0);
  EXPECT(memcmp(out_v + BUDGET * HEAD_DIM, v + SEQ_LEN * HEAD_DIM,
                sizeof(float) * BUDGET * HEAD_DIM) == 0);
  memset(&in_place, 0, sizeof(in_place));
  in_place.struct_size = sizeof(in_place);
  in_place.layer = NUM_LAYERS;
  in_place.k = &k_view;
  in_place.v = &v_view;
  EXPECT(keepset_operation_reserve_in_place(operation, layers, 1) == KEEPSET_INVALID_ARGUMENT);
  EXPECT(strstr(keepset_last_error(), "layer 2, want 0..1") != NULL);
  in_place.layer = 1;
  EXPECT(keepset_operation_reserve_in_place(operation, layers, 1) == KEEPSET_OK);
  EXPECT(v[SEQ_LEN * HEAD_DIM] == (float)(SEQ_LEN * HEAD_DIM));
  EXPECT(keepset_operation_gather_in_place(operation, 1, &k_view, &v_view) == KEEPSET_OK);
  EXPECT(memcmp(v, out_v, sizeof(float) * BUDGET * HEAD_DIM) == 0);
  EXPECT(memcmp(v + SEQ_LEN * HEAD_DIM, out_v + BUDGET * HEAD_DIM,
                sizeof(float) * BUDGET * HEAD_DIM) == 0);
  EXPECT(keepset_result_stage_seconds(result, "score") >= 0.0);
  EXPECT(isnan(keepset_result_stage_seconds(result, "no such stage")));
  EXPECT(keepset_result_keep_indices(result, 2, 0, &indices, &count) == KEEPSET_INVALID_ARGUMENT);
  EXPECT(strstr(keepset_last_error(), "layer 2, want 0..1") != NULL);
  keepset_operation_destroy(operation);
}

/* Position t has t of the attention of every head: the last BUDGET positions stay. */
static void ObservesColumnStatistics(keepset_engine* engine) {
  float sums[NUM_QO_HEADS * SEQ_LEN];
  keepset_operation_spec spec = Spec();
  keepset_operation* operation = NULL;
  const keepset_result* result = NULL;
  const int32_t* indices = NULL;
  int64_t count = 0;
  keepset_layer_observation observation;
  int layer, i;

  for (i = 0; i < NUM_QO_HEADS * SEQ_LEN; ++i) sums[i] = (float)(i % SEQ_LEN);
  spec.policy = "tova";
  spec.num_rows = 1;
  spec.scope = "layer_equal";
  EXPECT(keepset_operation_begin(engine, &spec, &operation) == KEEPSET_OK);
  memset(&observation, 0, sizeof(observation));
  observation.struct_size = sizeof(observation);
  observation.column_stats.data = sums;
  observation.column_stats.size_bytes = sizeof(sums);
  observation.column_stats.dtype = KEEPSET_F32;
  observation.column_stats.num_qo_heads = NUM_QO_HEADS;
  observation.column_stats.num_rows = 1;
  observation.column_stats.last_dim = SEQ_LEN;
  observation.column_stats.head_stride = SEQ_LEN;
  EXPECT(keepset_operation_observe(operation, 0, &observation) == KEEPSET_INVALID_ARGUMENT);
  EXPECT(strstr(keepset_last_error(), "layer 0: column_stats: column_reduction=0") != NULL);
  observation.column_reduction = KEEPSET_COLUMN_SUM;
  /* A caller of before column_stats says so by its size, and has none. */
  observation.struct_size = offsetof(keepset_layer_observation, column_stats);
  EXPECT(keepset_operation_observe(operation, 0, &observation) == KEEPSET_INVALID_ARGUMENT);
  EXPECT(strstr(keepset_last_error(), "layer 0: missing q_window") != NULL);
  observation.struct_size = sizeof(observation);
  for (layer = 0; layer < NUM_LAYERS; ++layer) {
    EXPECT(keepset_operation_observe(operation, layer, &observation) == KEEPSET_OK);
  }
  EXPECT(keepset_operation_finish(operation, &result) == KEEPSET_OK);
  EXPECT(keepset_result_keep_indices(result, 0, 0, &indices, &count) == KEEPSET_OK);
  EXPECT(count == BUDGET);
  EXPECT(indices[0] == SEQ_LEN - BUDGET && indices[BUDGET - 1] == SEQ_LEN - 1);
  keepset_operation_destroy(operation);
}

static void RefusesAnUnknownBaseOfLse(keepset_engine* engine) {
  const float lse = 1.0f;
  keepset_operation_spec spec = Spec();
  keepset_operation* operation = NULL;
  keepset_layer_observation observation;

  EXPECT(keepset_operation_begin(engine, &spec, &operation) == KEEPSET_OK);
  memset(&observation, 0, sizeof(observation));
  observation.struct_size = sizeof(observation);
  observation.window_lse.data = &lse;
  observation.window_lse.size_bytes = sizeof(lse);
  observation.window_lse.dtype = KEEPSET_F32;
  observation.window_lse.last_dim = 1;
  observation.lse_base = 10;
  EXPECT(keepset_operation_observe(operation, 0, &observation) == KEEPSET_INVALID_ARGUMENT);
  EXPECT(strstr(keepset_last_error(), "layer 0: window_lse: lse_base=10, want") != NULL);
  keepset_operation_destroy(operation);
}

static void TakesNoDeviceMemory(keepset_engine* engine) {
  const keepset_operation_spec spec = Spec();
  keepset_device_bytes_options options;
  int64_t bytes = -1;

  EXPECT(keepset_operation_device_bytes(engine, &spec, NULL, &bytes) == KEEPSET_OK);
  EXPECT(bytes == 0);
  memset(&options, 0, sizeof(options));
  options.struct_size = sizeof(options);
  options.handover = 2;
  EXPECT(keepset_operation_device_bytes(engine, &spec, &options, &bytes) ==
         KEEPSET_INVALID_ARGUMENT);
  EXPECT(strstr(keepset_last_error(), "handover=2, want") != NULL);
  options.handover = KEEPSET_LAYERS_ONE_BY_ONE;
  options.row_move = -1;
  EXPECT(keepset_operation_device_bytes(engine, &spec, &options, &bytes) ==
         KEEPSET_INVALID_ARGUMENT);
  EXPECT(strstr(keepset_last_error(), "row_move=-1, want") != NULL);
}

static void ReportsErrors(keepset_engine* engine) {
  keepset_operation_spec spec = Spec();
  keepset_operation* operation = NULL;
  keepset_engine_options options;
  keepset_engine* other = NULL;
  keepset_table* table = NULL;

  spec.policy = "no_such_policy";
  EXPECT(keepset_operation_begin(engine, &spec, &operation) == KEEPSET_NOT_FOUND);
  EXPECT(strstr(keepset_last_error(), "no_such_policy") != NULL);
  spec = Spec();
  spec.budget = 0;
  EXPECT(keepset_operation_begin(engine, &spec, &operation) == KEEPSET_INVALID_ARGUMENT);
  EXPECT(strstr(keepset_last_error(), "budget_tokens=0") != NULL);
  spec = Spec();
  spec.scope = "everywhere";
  EXPECT(keepset_operation_begin(engine, &spec, &operation) == KEEPSET_INVALID_ARGUMENT);
  EXPECT(strstr(keepset_last_error(), "everywhere") != NULL);
  spec = Spec();
  spec.struct_size = 8;
  EXPECT(keepset_operation_begin(engine, &spec, &operation) == KEEPSET_INVALID_ARGUMENT);
  EXPECT(strstr(keepset_last_error(), "struct_size=8") != NULL);
  spec = Spec();
  spec.cuda_stream = &spec;
  EXPECT(keepset_operation_begin(engine, &spec, &operation) == KEEPSET_INVALID_ARGUMENT);
  EXPECT(strstr(keepset_last_error(), "want backend cuda or no stream") != NULL);
  /* A caller that was built before the field. */
  spec.struct_size = offsetof(keepset_operation_spec, cuda_stream);
  EXPECT(keepset_operation_begin(engine, &spec, &operation) == KEEPSET_OK);
  keepset_operation_destroy(operation);
  operation = NULL;
  spec = Spec();
  spec.keep_full_on_short_memory = 2;
  EXPECT(keepset_operation_begin(engine, &spec, &operation) == KEEPSET_INVALID_ARGUMENT);
  EXPECT(strstr(keepset_last_error(), "keep_full_on_short_memory=2, want 0 or 1") != NULL);
  spec.struct_size = offsetof(keepset_operation_spec, keep_full_on_short_memory);
  EXPECT(keepset_operation_begin(engine, &spec, &operation) == KEEPSET_OK);
  keepset_operation_destroy(operation);
  operation = NULL;
  spec = Spec();
  spec.kv_dtype = 9;
  EXPECT(keepset_operation_begin(engine, &spec, &operation) == KEEPSET_INVALID_ARGUMENT);
  EXPECT(strstr(keepset_last_error(), "dtype=9") != NULL);
  EXPECT(keepset_operation_begin(NULL, &spec, &operation) == KEEPSET_INVALID_ARGUMENT);
  EXPECT(strstr(keepset_last_error(), "engine is NULL") != NULL);
  EXPECT(operation == NULL);
  memset(&options, 0, sizeof(options));
  options.struct_size = sizeof(options);
  options.backend = "abacus";
  EXPECT(keepset_engine_create(&options, &other) == KEEPSET_NOT_FOUND);
  options.backend = NULL;
  options.window_kernels = "hopper";
  EXPECT(keepset_engine_create(&options, &other) == KEEPSET_INVALID_ARGUMENT);
  EXPECT(strstr(keepset_last_error(), "window_kernels=\"hopper\"") != NULL);
  options.window_kernels = NULL;
  options.device_memory_bytes = 1 << 20;
  EXPECT(keepset_engine_create(&options, &other) == KEEPSET_INVALID_ARGUMENT);
  EXPECT(strstr(keepset_last_error(), "device_memory_bytes=1048576, want none") != NULL);
  /* Callers that were built before a field. */
  options.struct_size = offsetof(keepset_engine_options, device_memory_bytes);
  EXPECT(keepset_engine_create(&options, &other) == KEEPSET_OK);
  keepset_engine_destroy(other);
  options.window_kernels = "hopper";
  options.struct_size = offsetof(keepset_engine_options, window_kernels);
  options.num_threads = 1;
  EXPECT(keepset_engine_create(&options, &other) == KEEPSET_OK);
  keepset_engine_destroy(other);
  EXPECT(keepset_table_load("/no/such/file", &table) == KEEPSET_NOT_FOUND);
  EXPECT(strstr(keepset_last_error(), "/no/such/file") != NULL);
}

static void WritesAndLoadsATable(void) {
  char directory[] = "/tmp/keepset_c_abi_XXXXXX";
  char path[64];
  const int64_t budgets[] = {3, 5};
  keepset_table* table = NULL;
  const char* difference = NULL;
  const float* values = NULL;
  size_t count = 0;

  EXPECT(mkdtemp(directory) != NULL);
  snprintf(path, sizeof(path), "%s/uniform.safetensors", directory);
  EXPECT(keepset_table_write_uniform(path, "plain-c", "1", kModel, 1.0f, 0.9f, budgets, 2) ==
         KEEPSET_OK);
  EXPECT(keepset_table_load(path, &table) == KEEPSET_OK);
  if (table != NULL) {
    EXPECT(strcmp(keepset_table_name(table), "plain-c") == 0);
    EXPECT(strcmp(keepset_table_version(table), "1") == 0);
    EXPECT(strcmp(keepset_table_kind(table), "compilerkv") == 0);
    EXPECT(strncmp(keepset_table_digest(table), "sha256:", 7) == 0);
    EXPECT(strstr(keepset_table_inspect(table), "uniform") != NULL);
    EXPECT(keepset_table_diff(table, table, &difference) == KEEPSET_OK);
    EXPECT(difference != NULL && difference[0] == '\0');
    EXPECT(keepset_table_compare(table, table, &difference) == KEEPSET_OK);
    EXPECT(strstr(difference, "head_rankings") != NULL);
    EXPECT(keepset_table_values(table, "gate_thresholds", &values, &count) == KEEPSET_OK);
    EXPECT(count > 0 && values[count - 1] == 0.9f);
    EXPECT(keepset_table_values(table, "weights", &values, &count) == KEEPSET_NOT_FOUND);
  }
  keepset_table_destroy(table);
  EXPECT(keepset_table_write_uniform(path, "plain-c", "1", kModel, 9.0f, 0.9f, NULL, 0) ==
         KEEPSET_INVALID_ARGUMENT);
  remove(path);
  rmdir(directory);
}

int main(void) {
  keepset_engine* engine = NULL;
  keepset_engine_options options;
  memset(&options, 0, sizeof(options));
  options.struct_size = sizeof(options);
  options.num_threads = 1;
  EXPECT(keepset_abi_version() == KEEPSET_ABI_VERSION);
  EXPECT(keepset_version()[0] != '\0');
  EXPECT(keepset_engine_create(&options, &engine) == KEEPSET_OK);
  if (engine == NULL) return EXIT_FAILURE;
  EXPECT(strncmp(keepset_engine_backend(engine), "cpu/", 4) == 0);
  EXPECT(strstr(keepset_engine_policies(engine), "compilerkv\nsnapkv") != NULL);
  RunsAndGathers(engine);
  ObservesColumnStatistics(engine);
  RefusesAnUnknownBaseOfLse(engine);
  TakesNoDeviceMemory(engine);
  ReportsErrors(engine);
  WritesAndLoadsATable();
  keepset_engine_destroy(engine);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
