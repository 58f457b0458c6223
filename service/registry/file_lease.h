// A read lease on an open file: while it is held nobody has the file open for writing, and whoever
// wants to waits (up to /proc/sys/fs/lease-break-time) until it is given back.
//
// The kernel's notice to the holder is sent as SIGURG, which is ignored unless a program asks for
// it, instead of the usual SIGIO, which would end the process.
#ifndef KEEPSET_SERVICE_REGISTRY_FILE_LEASE_H_
#define KEEPSET_SERVICE_REGISTRY_FILE_LEASE_H_

namespace keepset::service {

class FileLease {
 public:
  enum class State {
    kHeld,
    kWriterActive,  // somebody has the file open for writing now
    kUnsupported,   // not our file and no CAP_LEASE, or a filesystem without leases
  };

  // `fd` is open for reading only and outlives the lease.
  explicit FileLease(int fd);
  ~FileLease();
  FileLease(const FileLease&) = delete;
  FileLease& operator=(const FileLease&) = delete;

  State state() const { return state_; }

 private:
  const int fd_;
  State state_ = State::kUnsupported;
};

}  // namespace keepset::service

#endif  // KEEPSET_SERVICE_REGISTRY_FILE_LEASE_H_
