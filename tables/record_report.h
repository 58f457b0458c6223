// The parts that the compiler's report and the summary of records share. Private to tables/.
#ifndef KEEPSET_TABLES_RECORD_REPORT_H_
#define KEEPSET_TABLES_RECORD_REPORT_H_

#include <cstdint>

#include "nlohmann/json.hpp"
#include "tables/cql_solver.h"
#include "tables/record_statistics.h"

namespace keepset::tables {

using ReportJson = nlohmann::ordered_json;

// Counts of records: all, per kind, rejected, duplicate, per paired_policy and budget.
ReportJson CountsReport(const RecordStatistics& statistics);

// {"min", "median", "max"} of the records per state that has any.
ReportJson RecordsPerState(const StateStatistics& states);

// [{"action": value, "records": n}], all actions of the grid.
ReportJson RecordsPerAction(const StateStatistics& states, const ActionGrid& grid);

// Edges, and the records of each entropy x perplexity cell over all layers and budgets.
ReportJson CoverageReport(const GateStatistics& gates);

// {"budget", "layer", and "head" or "kv_head", or "entropy_bin" and "ppl_bin"}.
ReportJson HeadStateReport(const StateKey& key, HeadUnit unit);
ReportJson GateStateReport(const StateKey& key, int64_t num_ppl_bins);

// States whose choice the data hardly supports: those with one logged action only, and those whose
// best two values lie within two standard errors of each other.
ReportJson ConfidenceReport(const StateStatistics& states, const FittedStates& fitted);

}  // namespace keepset::tables

#endif  // KEEPSET_TABLES_RECORD_REPORT_H_
