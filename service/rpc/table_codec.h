// The registry's values as messages of keepset.v1 and back. Pure functions.
#ifndef KEEPSET_SERVICE_RPC_TABLE_CODEC_H_
#define KEEPSET_SERVICE_RPC_TABLE_CODEC_H_

#include "absl/status/statusor.h"
#include "keepset/v1/table.pb.h"
#include "service/registry/registry_types.h"

namespace keepset::service {

TableRef DecodeTableRef(const v1::TableRef& wire);
// 0..100 in steps of 0.01; InvalidArgument otherwise.
absl::StatusOr<int> DecodePercent(double percent);

void EncodeVersion(const TableVersionInfo& version, v1::TableVersion* wire);
void EncodeLine(const LineView& line, v1::TableLine* wire);
void EncodeSource(const SourceView& source, v1::TableSourceState* wire);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_RPC_TABLE_CODEC_H_
