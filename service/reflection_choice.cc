#include "service/reflection_choice.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>

namespace keepset::service {
namespace {

class ReflectionChoice final : public grpc::ServerBuilderOption {
 public:
  explicit ReflectionChoice(Reflection reflection) : reflection_(reflection) {}
  void UpdateArguments(grpc::ChannelArguments* /*arguments*/) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    std::erase_if(*plugins,
                  [](const auto& plugin) { return plugin->name() == "proto_server_reflection"; });
    if (reflection_ == Reflection::kOn) {
      plugins->push_back(std::make_unique<grpc::reflection::ProtoServerReflectionPlugin>());
    }
  }

 private:
  const Reflection reflection_;
};

}  // namespace

std::unique_ptr<grpc::ServerBuilderOption> NewReflectionChoice(Reflection reflection) {
  return std::make_unique<ReflectionChoice>(reflection);
}

}  // namespace keepset::service
