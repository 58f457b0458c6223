// TableService's messages as the typed client's structs.
#ifndef KEEPSET_CLIENTS_CPP_TABLE_CODEC_H_
#define KEEPSET_CLIENTS_CPP_TABLE_CODEC_H_

#include "clients/cpp/table_client.h"
#include "keepset/v1/table.pb.h"

namespace keepset::client {

void EncodeRef(const TableRef& table, v1::TableRef* out);

TableVersion DecodeVersion(const v1::TableVersion& version);
TableLine DecodeLine(const v1::TableLine& line);
TableList DecodeList(const v1::ListTablesResponse& response);
TableValidation DecodeValidation(const v1::ValidateTableResponse& response);
TableUploadResult DecodeUpload(const v1::LoadTableResponse& response);
TableWriteResult DecodeWrite(const v1::TableWriteResponse& response);
TableChange DecodeChange(const v1::WatchTablesResponse& response);

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_TABLE_CODEC_H_
