// What a server says of itself, from messages of keepset.v1. Pure functions.
#ifndef KEEPSET_CLIENTS_CPP_SERVER_INFO_CODEC_H_
#define KEEPSET_CLIENTS_CPP_SERVER_INFO_CODEC_H_

#include "clients/cpp/server_info.h"
#include "keepset/v1/server.pb.h"

namespace keepset::client {

ServerInfo DecodeServerInfo(const v1::GetServerInfoResponse& response);
ServerStatistics DecodeStatistics(const v1::GetStatisticsResponse& response);

}  // namespace keepset::client

#endif  // KEEPSET_CLIENTS_CPP_SERVER_INFO_CODEC_H_
