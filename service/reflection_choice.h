// Reflection is a process-wide plugin of gRPC; this makes it a choice of one server.
#ifndef KEEPSET_SERVICE_REFLECTION_CHOICE_H_
#define KEEPSET_SERVICE_REFLECTION_CHOICE_H_

#include <grpcpp/impl/server_builder_option.h>

#include <memory>
#include <vector>

namespace keepset::service {

enum class Reflection { kOff, kOn };

// For ServerBuilder::SetOption.
std::unique_ptr<grpc::ServerBuilderOption> NewReflectionChoice(Reflection reflection);

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REFLECTION_CHOICE_H_
