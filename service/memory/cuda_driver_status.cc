#include "service/memory/cuda_driver_status.h"

#include "absl/strings/str_cat.h"

namespace keepset::service {
namespace {

// Of the host, whatever the call was about.
absl::Status HostError(cuda_abi::Result result, absl::string_view text) {
  const auto say = [&](absl::string_view why) { return absl::StrCat(text, ", ", why); };
  switch (result) {
    case cuda_abi::kDeviceUnavailable:
      return absl::FailedPreconditionError(
          say("another process has the device for itself: set its compute mode to default"));
    case cuda_abi::kDeviceNotLicensed:
      return absl::FailedPreconditionError(say("the virtual GPU has no licence: acquire one"));
    case cuda_abi::kSystemNotReady:
      return absl::UnavailableError(
          say("the system is not ready: the services of its devices (fabric manager) must run"));
    case cuda_abi::kSystemDriverMismatch:
    case cuda_abi::kCompatNotSupportedOnDevice:
      return absl::FailedPreconditionError(
          say("libcuda does not fit the kernel's driver or the device: install the same version of "
              "both"));
    case cuda_abi::kMpsConnectionFailed:
    case cuda_abi::kMpsRpcFailure:
    case cuda_abi::kMpsServerNotReady:
      return absl::UnavailableError(
          say("the MPS server does not answer: start it, or run without MPS"));
    case cuda_abi::kMpsMaxClientsReached:
    case cuda_abi::kMpsMaxConnectionsReached:
      return absl::ResourceExhaustedError(
          say("the MPS server has no room: end other clients of it"));
    default:
      return absl::InternalError(text);
  }
}

absl::Status ImportError(cuda_abi::Result result, absl::string_view text) {
  const auto say = [&](absl::string_view why) { return absl::StrCat(text, ", ", why); };
  switch (result) {
    case cuda_abi::kInvalidValue:
    case cuda_abi::kInvalidHandle:
    case cuda_abi::kNotFound:
      return absl::InvalidArgumentError(
          say("the handle is of freed memory, of another device, of another kind of allocation, or "
              "the sizes do not fit it"));
    case cuda_abi::kInvalidDevice:
    case cuda_abi::kNoDevice:
      return absl::FailedPreconditionError(
          say("the memory is of a device that keepsetd does not see: let CUDA_VISIBLE_DEVICES of "
              "keepsetd list it"));
    case cuda_abi::kOutOfMemory:
      return absl::ResourceExhaustedError(say("no memory or address space left"));
    case cuda_abi::kTooManyPeers:
      return absl::ResourceExhaustedError(
          say("the memory is of another device than device_uuid says, and that one has no room for "
              "one more peer: name the device of the memory"));
    case cuda_abi::kMapFailed:
      return absl::FailedPreconditionError(say("the allocation cannot be mapped here"));
    case cuda_abi::kAlreadyMapped:
      return absl::FailedPreconditionError(
          say("an earlier region over this memory is still mapped; retire it"));
    case cuda_abi::kPeerAccessUnsupported:
      return absl::FailedPreconditionError(
          say("the memory is of another device than device_uuid says, and the two are no peers: "
              "name the device of the memory"));
    case cuda_abi::kNotSupported:
      return absl::FailedPreconditionError(say("this device or driver cannot share that way"));
    case cuda_abi::kOperatingSystem:
    case cuda_abi::kNotPermitted:
      return absl::FailedPreconditionError(
          say("the operating system refuses: worker and keepsetd need the same user and, in "
              "containers, the same IPC namespace"));
    default:
      return HostError(result, text);
  }
}

// A value that the driver refuses is no caller's here.
absl::Status AllocationError(cuda_abi::Result result, absl::string_view text) {
  const auto say = [&](absl::string_view why) { return absl::StrCat(text, ", ", why); };
  switch (result) {
    case cuda_abi::kOutOfMemory:
      return absl::ResourceExhaustedError(
          say("the device has no memory left: ask for less, or leave more of it beside the engine "
              "for memory.max_owned_bytes"));
    case cuda_abi::kNotSupported:
      return absl::FailedPreconditionError(
          say("this device or driver makes no memory to share that way: ask for another kind"));
    case cuda_abi::kOperatingSystem:
    case cuda_abi::kNotPermitted:
      return absl::FailedPreconditionError(
          say("the operating system refuses keepsetd memory of the device to share: ask for "
              "another kind"));
    default:
      return HostError(result, text);
  }
}

}  // namespace

absl::Status DriverError(cuda_abi::Result result, absl::string_view text, MemoryOf memory) {
  return memory == MemoryOf::kOurs ? AllocationError(result, text) : ImportError(result, text);
}

}  // namespace keepset::service
