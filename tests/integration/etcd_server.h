// The real etcd as a child of the test: one member, free ports, its data in a temporary directory.
#ifndef KEEPSET_TESTS_INTEGRATION_ETCD_SERVER_H_
#define KEEPSET_TESTS_INTEGRATION_ETCD_SERVER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "etcd/rpc.grpc.pb.h"
#include "service/memory/memory_transport.h"
#include "tests/integration/child_process.h"

namespace keepset::integration {

class EtcdServer {
 public:
  // Who can reach a started etcd.
  enum class Listen {
    kEverybody,
    kAdminOnly,  // not `endpoint()`: clients see it as gone while the test changes its keys
  };
  // `flags` are added to etcd's command line. With https its certificate is for localhost.
  explicit EtcdServer(std::vector<std::string> flags = {}, std::string scheme = "http");
  // Kills it and removes its data.
  ~EtcdServer();
  EtcdServer(const EtcdServer&) = delete;
  EtcdServer& operator=(const EtcdServer&) = delete;

  // False, with the test failed, when it is not ready before the deadline of tests.
  bool Start(Listen listen = Listen::kEverybody);
  // SIGKILL; data and ports stay, Start goes on with them.
  void Kill();
  // SIGSTOP and SIGCONT.
  void Freeze();
  void Thaw();
  // Forgets everything: the next Start is another, empty cluster on the same ports.
  void EraseData();

  // host:port that clients under test use.
  std::string endpoint() const;
  // The test's own way in, past the product's client.
  void Put(const std::string& key, const std::string& value);
  // All at one revision, which is returned.
  int64_t PutAll(const std::vector<std::pair<std::string, std::string>>& pairs) {
    return Commit(pairs, "");
  }
  // The same, and the key `deleted` goes; empty: none does.
  int64_t Commit(const std::vector<std::pair<std::string, std::string>>& pairs,
                 const std::string& deleted);
  void Delete(const std::string& key);
  std::string Get(const std::string& key);  // empty: not there
  int64_t Revision();
  // Makes etcd forget everything before its newest revision.
  void Compact();
  // Users from here on: "root" with `password`.
  void RequireLogin(const std::string& password);

 private:
  bool TryStart(Listen listen);
  std::string Url(int port) const;
  std::unique_ptr<etcdserverpb::KV::Stub> Keys();
  std::unique_ptr<grpc::ClientContext> Context() const;

  const std::vector<std::string> flags_;
  const std::string scheme_;
  std::string directory_;
  int port_ = 0;
  int admin_port_ = 0;
  int peer_port_ = 0;
  std::string token_;
  std::unique_ptr<ChildProcess> process_;
};

}  // namespace keepset::integration

#endif  // KEEPSET_TESTS_INTEGRATION_ETCD_SERVER_H_
