#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "service/registry/etcd/etcd_client.h"

namespace keepset::service::etcd {
namespace {

using testing::HasSubstr;

absl::Status Check(const ClientOptions& options) { return NewClient(options).status(); }

ClientOptions At(std::vector<std::string> endpoints) {
  ClientOptions options;
  options.endpoints = std::move(endpoints);
  return options;
}

TEST(EtcdEndpoints, TakesHostsAndUrls) {
  for (const char* endpoint : {"etcd:2379", "http://etcd:2379", "https://etcd.example:2379/",
                               "10.0.0.1:2379", "[::1]:2379"}) {
    const absl::Status status = Check(At({endpoint}));
    EXPECT_TRUE(status.ok()) << endpoint << ": " << status;
  }
}

TEST(EtcdEndpoints, RefusesWhatIsNoHostAndPort) {
  for (const char* endpoint :
       {"", "etcd", ":2379", "etcd:", "etcd:0", "etcd:65536", "http://", "etcd:x"}) {
    const absl::Status status = Check(At({endpoint}));
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << endpoint;
    EXPECT_THAT(std::string(status.message()), HasSubstr("want host:port")) << endpoint;
  }
}

TEST(EtcdEndpoints, RefusesNone) { EXPECT_TRUE(absl::IsInvalidArgument(Check({}))); }

TEST(EtcdEndpoints, RefusesToMixPlainAndTls) {
  EXPECT_TRUE(absl::IsInvalidArgument(Check(At({"http://a:1", "https://b:1"}))));
}

TEST(EtcdEndpoints, RefusesPlainUrlsBesideTlsFiles) {
  ClientOptions options = At({"http://a:1"});
  options.ca_file = "ca.pem";
  EXPECT_TRUE(absl::IsInvalidArgument(Check(options)));
}

TEST(EtcdEndpoints, RefusesHalfAKeyPair) {
  ClientOptions options = At({"a:1"});
  options.certificate_file = "client.pem";
  EXPECT_TRUE(absl::IsInvalidArgument(Check(options)));
}

TEST(EtcdEndpoints, RefusesAUserWithoutAPassword) {
  ClientOptions options = At({"127.0.0.1:1"});
  options.username = "keepset";
  EXPECT_TRUE(absl::IsInvalidArgument(Check(options)));
}

TEST(EtcdEndpoints, RefusesToSendAPasswordInTheClearToAnotherHost) {
  ClientOptions options = At({"etcd:2379"});
  options.username = "keepset";
  options.password_file = "password";
  const absl::Status status = Check(options);
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("https://"));
  options.endpoints = {"https://etcd:2379"};
  EXPECT_TRUE(Check(options).ok());
  options.endpoints = {"127.0.0.1:2379"};
  EXPECT_TRUE(Check(options).ok());
}

TEST(PrefixEnd, IsTheFirstKeyBehindThePrefix) {
  EXPECT_EQ(PrefixEnd("/keepset/"), "/keepset0");
  EXPECT_EQ(PrefixEnd("a\xff"), "b");
  EXPECT_EQ(PrefixEnd("\xff\xff"), std::string(1, '\0'));
  EXPECT_EQ(PrefixEnd(""), std::string(1, '\0'));
}

}  // namespace
}  // namespace keepset::service::etcd
