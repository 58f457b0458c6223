#include "service/server.h"

#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/functional/any_invocable.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "engine/operation_types.h"
#include "engine/policies/policy_registry.h"
#include "kernels/backend_registry.h"
#include "service/health_board.h"
#include "service/health_listener.h"
#include "service/memory/session_manager.h"
#include "service/memory/side_socket.h"
#include "service/metrics/metrics.h"
#include "service/reflection_choice.h"
#include "service/registry/source_registry.h"
#include "service/rpc/compression_service.h"
#include "service/rpc/server_service.h"
#include "service/rpc/session_service.h"
#include "service/rpc/table_service.h"
#include "service/server_config/server_config.h"
#include "service/server_info.h"
#include "service/server_observers.h"
#include "service/server_tables.h"
#include "service/server_upkeep.h"
#include "service/tcp_credentials.h"
#include "service/unix_listener.h"
#include "tables/table_store.h"

namespace keepset::service {
namespace {

// Beside inline tensors a message holds block tables, positions and names.
constexpr int64_t kMessageSlackBytes = int64_t{16} << 20;
// After the last answer: time for replies on their way, then open calls are cut.
constexpr auto kShutdownGrace = std::chrono::milliseconds(500);
constexpr absl::string_view kMetricsOff = "off";
constexpr size_t kFencesPerSession = 4096;
// Each waiting one holds the scores of its operation.
constexpr int64_t kShadowQueueCapacity = 16;
constexpr int64_t kControlQueueCapacity = 1024;

std::vector<std::string> DefaultedInputNames() {
  std::vector<std::string> names;
  for (const engine::DefaultedInput input : engine::kDefaultedInputs) {
    names.emplace_back(engine::DefaultedInputName(input));
  }
  return names;
}

// Uploads come from nobody's watcher: they are one more source.
std::vector<std::string> TableSourceNames() {
  std::vector<std::string> names = ListTableSources();
  names.emplace_back("upload");
  return names;
}

class ServerImpl final : public Server {
 public:
  ServerImpl(const v1::ServerConfig& config, Surroundings surroundings)
      : config_(config),
        clock_(surroundings.clock),
        log_(surroundings.log),
        backend_(std::move(surroundings.backend)),
        on_device_fault_(std::move(surroundings.on_device_fault)),
        policies_(engine::NewBuiltinPolicyRegistry()),
        admission_([this](int64_t running) { metrics_->SetOperationsInFlight(running); }),
        fences_(kFencesPerSession),
        correlation_ids_(surroundings.random_seed) {}

  // Order matters: gRPC's calls end before the queues that answer them, those before the services.
  ~ServerImpl() override { Stop(); }

  void Stop() override {
    if (std::exchange(is_stopped_, true)) return;
    if (grpc_server_ != nullptr) {
      StartDraining();
      compression_->CloseStreams();
      session_service_->CloseStreams();
      table_service_->CloseStreams();
      health_listener_.reset();
      health_.Detach(grpc_server_->GetHealthCheckService());
      grpc_server_->Shutdown(std::chrono::system_clock::now() + kShutdownGrace);
      grpc_server_->Wait();
    }
    if (upkeep_ != nullptr) upkeep_->Stop();
    side_socket_.reset();
    if (server_tables_ != nullptr) server_tables_->Stop();
    queue_.reset();
    table_queue_.reset();
    shadow_queue_.reset();
    registration_.reset();
    retirement_.reset();
    if (sessions_ != nullptr) sessions_->Shutdown();
    unix_listeners_.clear();
  }

  absl::Status Init() {
    if (backend_ == nullptr) {
      absl::StatusOr<std::unique_ptr<kernels::ComputeBackend>> backend = kernels::NewBackend(
          config_.backend(),
          {.num_threads = static_cast<int>(config_.num_threads()),
           .window_kernels = config_.window_kernels(),
           .device_memory_bytes = static_cast<int64_t>(config_.device_memory_bytes())});
      // No start of this program will find it.
      if (absl::IsNotFound(backend.status())) {
        return absl::InvalidArgumentError(backend.status().message());
      }
      KEEPSET_ASSIGN_OR_RETURN(backend_, std::move(backend));
    }
    std::vector<std::unique_ptr<MemoryTransport>> transports =
        NewBuiltinTransports([this](absl::string_view kind) {
          if (kind == "posix_shm") return config_.memory().allow_posix_shm();
          // Memory of a device is of use to a backend of that device only.
          return SpaceOf(kind) == MemorySpace::kHost || absl::StartsWith(backend_->name(), "cuda/");
        });
    std::vector<std::string> transport_kinds;
    for (const auto& transport : transports) {
      transport_kinds.emplace_back(transport->kind());
      transport_support_.push_back({transport_kinds.back(), transport->DevicesSupported()});
    }
    metrics_ = Metrics::New({std::string(ServerVersion()), backend_->name()},
                            {.policies = policies_->Names(),
                             .region_kinds = transport_kinds,
                             .defaulted_inputs = DefaultedInputNames(),
                             .table_sources = TableSourceNames()});
    metrics_->SetQueueCapacity(config_.limits().queue_capacity());
    session_observer_ = std::make_unique<ServerSessionObserver>(
        *metrics_, log_, [this](absl::string_view session_id) {
          fences_.Forget(session_id);
          session_pins_.Forget(session_id);
          session_tenants_.Forget(session_id);
          operation_totals_.ForgetSession(session_id);
          session_service_->Forget(session_id);
        });
    table_observer_ = std::make_unique<ServerTableObserver>(*metrics_, log_, health_, clock_);
    sessions_ = SessionManager::New(
        {.max_sessions = static_cast<int64_t>(config_.memory().max_sessions()),
         .max_regions_per_session =
             static_cast<int64_t>(config_.memory().max_regions_per_session()),
         .max_region_bytes_per_session = config_.memory().max_region_bytes_per_session(),
         .default_lease = absl::Seconds(config_.memory().lease_seconds()),
         .max_owned_bytes = config_.memory().max_owned_bytes(),
         .max_owned_bytes_per_session = config_.memory().max_owned_bytes_per_session(),
         .owned_device_uuid = backend_->Device().uuid,
         .quarantine = absl::Seconds(config_.memory().quarantine_seconds())},
        std::move(transports), clock_, session_observer_.get(),
        // Whoever hangs up or lets a lease run out does so while the queue is there.
        [this](absl::AnyInvocable<void()> unmap) { retirement_->Continue(std::move(unmap)); });
    KEEPSET_ASSIGN_OR_RETURN(
        server_tables_, ServerTables::Start(config_, tables_, clock_, *metrics_, *table_observer_));
    StartServices();
    KEEPSET_RETURN_IF_ERROR(StartListening());
    upkeep_->Start();
    WarnOfFewDescriptors(config_.memory().max_sessions(), log_);
    LogReady();
    return absl::OkStatus();
  }

  const std::vector<std::string>& addresses() const override { return addresses_; }
  const std::string& side_socket() const override { return config_.side_socket(); }
  const std::string& metrics_address() const override { return metrics_address_; }
  const std::string& health_address() const override { return health_address_; }
  std::string RenderMetrics() const override { return metrics_->Render(); }

  void StartDraining() override {
    if (admission_.draining()) return;
    // First: whoever routes by readiness sends nothing that would be refused.
    health_.StopServing();
    admission_.StartDraining();
    session_service_->NotifyDraining();
    log_.Info("draining", {{"operations", absl::StrCat(admission_.running())}});
  }
  bool WaitIdle(absl::Duration timeout) override {
    const absl::Duration end = clock_.Monotonic() + timeout;
    if (!admission_.WaitIdle(timeout)) return false;
    return upkeep_->AwaitDeviceMemoryRetired(end);
  }
  uint64_t exported_device_bytes() const override { return OwnedDeviceBytes(*sessions_); }
  int64_t operations_running() const override { return admission_.running(); }

 private:
  void StartServices() {
    queue_ = WorkQueue::New(
        {.num_workers = static_cast<int>(config_.num_workers()),
         .capacity = config_.limits().queue_capacity(),
         .on_depth_change = [this](int64_t waiting) { metrics_->SetQueueDepth(waiting); }},
        clock_);
    registration_ = WorkQueue::New(
        {.num_workers = 1, .capacity = kControlQueueCapacity, .on_depth_change = {}}, clock_);
    retirement_ = WorkQueue::New(
        {.num_workers = 4, .capacity = kControlQueueCapacity, .on_depth_change = {}}, clock_);
    // Only a new process can use a failed device again: running operations end kept_full, the
    // supervisor restarts us.
    upkeep_ = std::make_unique<ServerUpkeep>(ServerUpkeep::Surroundings{.clock = clock_,
                                                                        .log = log_,
                                                                        .sessions = *sessions_,
                                                                        .metrics = *metrics_,
                                                                        .backend = *backend_,
                                                                        .blocking = *retirement_,
                                                                        .on_device_fault = [this] {
                                                                          StartDraining();
                                                                          if (on_device_fault_)
                                                                            on_device_fault_();
                                                                        }});
    shadow_queue_ = WorkQueue::New(
        {.num_workers = 1, .capacity = kShadowQueueCapacity, .on_depth_change = {}}, clock_);
    shadows_ = std::make_unique<ShadowRunner>(*shadow_queue_, *metrics_, log_, clock_);
    const ServiceContext context = {
        .policies = *policies_,
        .backend = *backend_,
        .tables = tables_,
        .sessions = *sessions_,
        .metrics = *metrics_,
        .log = log_,
        .clock = clock_,
        .admission = admission_,
        .fences = fences_,
        .session_pins = session_pins_,
        .session_tenants = session_tenants_,
        .totals = operation_totals_,
        .queue = *queue_,
        .correlation_ids = correlation_ids_,
        .shadows = *shadows_,
        .shadow = {.table = config_.shadow().table(),
                   .basis_points = static_cast<int>(std::lround(config_.shadow().percent() * 100))},
        .codec = {.max_inline_bytes = static_cast<int64_t>(config_.limits().max_inline_bytes()),
                  .max_seq_len = static_cast<int64_t>(config_.limits().max_seq_len()),
                  .max_layers = static_cast<int64_t>(config_.limits().max_layers())},
        .stream_credits = config_.limits().stream_credits(),
        .max_open_per_stream = config_.limits().queue_capacity(),
        .overload = config_.limits().shed_to_kept_full() ? OverloadAnswer::kShedToFull
                                                         : OverloadAnswer::kRefuse,
    };
    compression_ = CompressionService::New(context);
    session_service_ = SessionService::New(context, {.side_socket_path = config_.side_socket()},
                                           *registration_, *retirement_);
    server_service_ = NewServerService(
        {.info = DescribeServer(config_, *backend_, policies_->Names(), transport_support_),
         .admin = config_.enable_admin() ? AdminAccess::kAllowed : AdminAccess::kDenied,
         .start_draining = [this] { StartDraining(); }},
        context, *retirement_);
    table_queue_ = WorkQueue::New(
        {.num_workers = 2, .capacity = kControlQueueCapacity, .on_depth_change = {}}, clock_);
    table_service_ = TableService::New(
        {.writes = config_.table_writes() ? TableWrites::kAllowed : TableWrites::kDenied,
         .writers = {config_.table_writers().begin(), config_.table_writers().end()},
         .max_table_bytes = static_cast<int64_t>(config_.limits().max_table_bytes()),
         .tables_directory = config_.tables_directory()},
        {.registry = server_tables_->registry(),
         .authority = server_tables_->authority(),
         .validator = server_tables_->validator(),
         .policies = *policies_,
         .blocking = *table_queue_,
         .log = log_,
         .correlation_ids = correlation_ids_});
  }

  absl::Status StartListening() {
    grpc::EnableDefaultHealthCheckService(true);
    grpc::ServerBuilder builder;
    builder.SetOption(
        NewReflectionChoice(config_.disable_reflection() ? Reflection::kOff : Reflection::kOn));
    builder.SetMaxReceiveMessageSize(static_cast<int>(
        std::min<int64_t>(static_cast<int64_t>(std::max(config_.limits().max_inline_bytes(),
                                                        config_.limits().max_table_bytes())) +
                              kMessageSlackBytes,
                          std::numeric_limits<int>::max())));
    builder.SetMaxSendMessageSize(-1);
    // Without this a second server would share the port instead of being refused.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    KEEPSET_ASSIGN_OR_RETURN(const auto tcp_credentials, TcpCredentials(config_.tls()));
    std::vector<int> ports(config_.listen().size(), 0);
    for (size_t i = 0; i < config_.listen().size(); ++i) {
      const std::string& address = config_.listen()[i];
      if (!UnixPath(address).empty()) {
        KEEPSET_ASSIGN_OR_RETURN(
            std::unique_ptr<UnixListener> listener,
            UnixListener::Prepare(std::string(UnixPath(address)), config_.socket_mode()));
        builder.AddListeningPort(absl::StrCat("unix:", listener->private_path()),
                                 grpc::InsecureServerCredentials(), &ports[i]);
        unix_listeners_.push_back(std::move(listener));
      } else {
        builder.AddListeningPort(address, tcp_credentials, &ports[i]);
      }
    }
    builder.RegisterService(compression_.get());
    builder.RegisterService(session_service_.get());
    builder.RegisterService(server_service_.get());
    builder.RegisterService(table_service_.get());
    grpc_server_ = builder.BuildAndStart();
    for (size_t i = 0; i < ports.size(); ++i) {
      if (ports[i] != 0) continue;
      return absl::AlreadyExistsError(absl::StrCat(
          "listen ", config_.listen()[i], ": cannot be bound, the address is in use or not ours"));
    }
    if (grpc_server_ == nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat("listen ", absl::StrJoin(config_.listen(), ", "),
                       ": gRPC refused to start, see its message above"));
    }
    health_.Attach(grpc_server_->GetHealthCheckService());
    for (const auto& listener : unix_listeners_) KEEPSET_RETURN_IF_ERROR(listener->Publish());
    for (size_t i = 0; i < ports.size(); ++i) {
      const std::string& address = config_.listen()[i];
      addresses_.push_back(
          !UnixPath(address).empty()
              ? address
              : absl::StrCat(address.substr(0, address.rfind(':')), ":", ports[i]));
    }
    if (!config_.side_socket().empty()) {
      SideSocketOptions side_socket;
      side_socket.path = config_.side_socket();
      side_socket.mode = config_.socket_mode();
      side_socket.on_trouble = [this](const absl::Status& why) {
        log_.Warning("side_socket", {{"error", std::string(why.message())}});
      };
      KEEPSET_ASSIGN_OR_RETURN(side_socket_, SideSocketServer::Start(side_socket, *sessions_));
    }
    if (config_.metrics_listen() != kMetricsOff) {
      KEEPSET_ASSIGN_OR_RETURN(metrics_address_, metrics_->Serve(config_.metrics_listen()));
    }
    if (!config_.health_listen().empty()) {
      KEEPSET_ASSIGN_OR_RETURN(health_listener_,
                               HealthListener::Start(config_.health_listen(), health_));
      health_address_ = health_listener_->address();
    }
    return absl::OkStatus();
  }

  void LogReady() {
    if (const std::string note = backend_->Device().note; !note.empty()) {
      log_.Warning("device", {{"note", note}});
    }
    log_.Info("ready", {{"version", std::string(ServerVersion())},
                        {"listen", absl::StrJoin(addresses_, ",")},
                        {"side_socket", config_.side_socket()},
                        {"metrics", metrics_address_},
                        {"health", health_address_},
                        {"backend", backend_->name()},
                        {"tables", absl::StrCat(tables_.Snapshot()->tables.size())}});
  }

  const v1::ServerConfig config_;
  const Clock& clock_;
  Logger& log_;
  std::unique_ptr<kernels::ComputeBackend> backend_;
  const std::function<void()> on_device_fault_;
  const std::unique_ptr<engine::PolicyRegistry> policies_;
  std::vector<TransportSupport> transport_support_;
  std::unique_ptr<Metrics> metrics_;
  HealthBoard health_;
  std::unique_ptr<ServerSessionObserver> session_observer_;
  std::unique_ptr<ServerTableObserver> table_observer_;
  tables::TableStore tables_;
  std::unique_ptr<ServerTables> server_tables_;
  Admission admission_;
  FenceTable fences_;
  SessionPins session_pins_;
  SessionTenants session_tenants_;
  OperationTotals operation_totals_;
  CorrelationIds correlation_ids_;
  std::unique_ptr<CompressionService> compression_;
  std::unique_ptr<SessionService> session_service_;
  std::unique_ptr<v1::ServerService::CallbackService> server_service_;
  std::unique_ptr<TableService> table_service_;
  std::unique_ptr<SessionManager> sessions_;
  std::unique_ptr<WorkQueue> queue_;
  std::unique_ptr<WorkQueue> shadow_queue_;
  std::unique_ptr<ShadowRunner> shadows_;
  std::unique_ptr<WorkQueue> registration_;
  std::unique_ptr<WorkQueue> retirement_;
  std::unique_ptr<WorkQueue> table_queue_;
  std::unique_ptr<ServerUpkeep> upkeep_;
  std::vector<std::unique_ptr<UnixListener>> unix_listeners_;
  std::unique_ptr<grpc::Server> grpc_server_;
  std::unique_ptr<HealthListener> health_listener_;
  std::unique_ptr<SideSocketServer> side_socket_;
  std::vector<std::string> addresses_;
  std::string metrics_address_;
  std::string health_address_;
  bool is_stopped_ = false;
};

}  // namespace

absl::string_view ServerVersion() { return KEEPSET_VERSION; }

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const v1::ServerConfig& config,
                                                      Surroundings surroundings) {
  auto server = std::make_unique<ServerImpl>(config, std::move(surroundings));
  KEEPSET_RETURN_IF_ERROR(server->Init());
  return server;
}

}  // namespace keepset::service
