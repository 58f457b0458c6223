// The mirror against the real etcd, which is killed, compacted and replaced.
#include "service/registry/etcd/etcd_mirror.h"

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"
#include "tests/integration/etcd_server.h"
#include "tests/integration/eventually.h"

namespace keepset::service::etcd {
namespace {

using integration::EtcdServer;

// The keys as the listener was told, and how. Thread-safe.
class RecordingListener : public MirrorListener {
 public:
  void OnRead(const RangeResult& all) override {
    absl::MutexLock lock(&mutex_);
    ++reads_;
    pairs_.clear();
    for (const KeyValue& pair : all.pairs) pairs_[pair.key] = pair.value;
    revisions_.push_back(all.revision);
  }
  void OnChanged(int64_t revision, const std::vector<Change>& changes) override {
    absl::MutexLock lock(&mutex_);
    for (const Change& change : changes) {
      if (change.kind == Change::Kind::kDelete) {
        pairs_.erase(change.pair.key);
      } else {
        pairs_[change.pair.key] = change.pair.value;
      }
    }
    revisions_.push_back(revision);
  }
  void OnLost(const absl::Status& why) override {
    absl::MutexLock lock(&mutex_);
    ++losses_;
    last_loss_ = why;
    is_in_step_ = false;
  }
  void OnInStep() override {
    absl::MutexLock lock(&mutex_);
    is_in_step_ = true;
  }

  bool AwaitPairs(const std::map<std::string, std::string>& pairs) {
    return Await(
        [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return is_in_step_ && pairs_ == pairs; });
  }
  bool AwaitInStep() {
    return Await([&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return is_in_step_; });
  }
  bool AwaitLost() {
    return Await([&]()
                     ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return losses_ > 0 && !is_in_step_; });
  }
  int reads() const {
    absl::MutexLock lock(&mutex_);
    return reads_;
  }
  int losses() const {
    absl::MutexLock lock(&mutex_);
    return losses_;
  }
  std::vector<int64_t> revisions() const {
    absl::MutexLock lock(&mutex_);
    return revisions_;
  }

 private:
  bool Await(const std::function<bool()>& condition) {
    absl::MutexLock lock(&mutex_);
    return mutex_.AwaitWithTimeout(
        absl::Condition(
            +[](const std::function<bool()>* c) { return (*c)(); }, &condition),
        integration::TestDeadline());
  }

  mutable absl::Mutex mutex_;
  std::map<std::string, std::string> pairs_ ABSL_GUARDED_BY(mutex_);
  std::vector<int64_t> revisions_ ABSL_GUARDED_BY(mutex_);
  int reads_ ABSL_GUARDED_BY(mutex_) = 0;
  int losses_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Status last_loss_ ABSL_GUARDED_BY(mutex_);
  bool is_in_step_ ABSL_GUARDED_BY(mutex_) = false;
};

class EtcdMirrorTest : public testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(server_.Start()); }
  void TearDown() override {
    if (mirror_ != nullptr) mirror_->Stop();
  }

  void Follow() {
    ClientOptions options;
    options.endpoints = {server_.endpoint()};
    client_ = *NewClient(options);
    mirror_ = std::make_unique<Mirror>(MirrorOptions{.prefix = "p/",
                                                     .first_pause = absl::Milliseconds(10),
                                                     .last_pause = absl::Milliseconds(50)},
                                       *client_, listener_);
    mirror_->Start();
  }

  EtcdServer server_;
  RecordingListener listener_;
  std::unique_ptr<Client> client_;
  std::unique_ptr<Mirror> mirror_;
};

TEST_F(EtcdMirrorTest, ReadsAllThenFollowsEveryRevision) {
  server_.PutAll({{"p/a", "1"}, {"q/a", "x"}});
  Follow();
  ASSERT_TRUE(listener_.AwaitPairs({{"p/a", "1"}}));
  const int64_t first = server_.PutAll({{"p/a", "2"}, {"p/b", "1"}});
  server_.Delete("p/a");
  EXPECT_TRUE(listener_.AwaitPairs({{"p/b", "1"}}));
  EXPECT_EQ(listener_.revisions(), (std::vector<int64_t>{first - 1, first, first + 1}));
  EXPECT_EQ(listener_.reads(), 1);
}

TEST_F(EtcdMirrorTest, FollowsAPrefixWithoutKeys) {
  Follow();
  ASSERT_TRUE(listener_.AwaitPairs({}));
  server_.Put("p/a", "1");
  EXPECT_TRUE(listener_.AwaitPairs({{"p/a", "1"}}));
}

TEST_F(EtcdMirrorTest, GoesOnWhereItWasAfterEtcdWasKilled) {
  server_.Put("p/a", "1");
  Follow();
  ASSERT_TRUE(listener_.AwaitPairs({{"p/a", "1"}}));
  server_.Kill();
  ASSERT_TRUE(listener_.AwaitLost());
  ASSERT_TRUE(server_.Start());
  server_.Put("p/a", "2");
  EXPECT_TRUE(listener_.AwaitPairs({{"p/a", "2"}}));
  EXPECT_EQ(listener_.reads(), 1);
  EXPECT_EQ(listener_.losses(), 1);
}

TEST_F(EtcdMirrorTest, ReadsAgainWhenWhatItMissedIsForgotten) {
  server_.PutAll({{"p/a", "1"}, {"p/gone", "x"}});
  Follow();
  ASSERT_TRUE(listener_.AwaitPairs({{"p/a", "1"}, {"p/gone", "x"}}));
  server_.Kill();
  ASSERT_TRUE(server_.Start(EtcdServer::Listen::kAdminOnly));
  server_.Put("p/a", "2");
  server_.Delete("p/gone");
  server_.Compact();
  server_.Kill();
  ASSERT_TRUE(server_.Start());
  EXPECT_TRUE(listener_.AwaitPairs({{"p/a", "2"}}));
  EXPECT_EQ(listener_.reads(), 2);
}

TEST_F(EtcdMirrorTest, ReadsAgainWhenTheClusterIsAnotherOne) {
  for (int i = 0; i < 5; ++i) server_.Put("p/a", absl::StrCat(i));
  Follow();
  ASSERT_TRUE(listener_.AwaitPairs({{"p/a", "4"}}));
  server_.EraseData();
  ASSERT_TRUE(server_.Start());
  server_.Put("p/b", "new");
  EXPECT_TRUE(listener_.AwaitPairs({{"p/b", "new"}}));
}

TEST_F(EtcdMirrorTest, TellsOnceThatEtcdIsNotThereAndBeginsWhenItIs) {
  server_.Kill();
  Follow();
  ASSERT_TRUE(listener_.AwaitLost());
  ASSERT_TRUE(server_.Start());
  EXPECT_TRUE(listener_.AwaitInStep());
  EXPECT_EQ(listener_.losses(), 1);
}

TEST_F(EtcdMirrorTest, StopsWhileEtcdIsFrozen) {
  Follow();
  ASSERT_TRUE(listener_.AwaitInStep());
  server_.Freeze();
  mirror_->Stop();
  server_.Thaw();
}

}  // namespace
}  // namespace keepset::service::etcd
