#include "tests/kernels/cuda/fiber.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <cstdint>
#include <utility>

#include "base/check.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace keepset::kernels::cuda {
namespace {

size_t PageBytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

#if defined(__SANITIZE_ADDRESS__)
void StartSwitch(void** frames, const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(frames, stack, bytes);
}
void FinishSwitch(void* frames, const void** stack, size_t* bytes) {
  __sanitizer_finish_switch_fiber(frames, stack, bytes);
}
#else
void StartSwitch(void** /*frames*/, const void* /*stack*/, size_t /*bytes*/) {}
void FinishSwitch(void* /*frames*/, const void** /*stack*/, size_t* /*bytes*/) {}
#endif

}  // namespace

Fiber::Fiber() {
  const size_t bytes = PageBytes() + kStackBytes;
  void* const memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  KEEPSET_CHECK(memory != MAP_FAILED);
  KEEPSET_CHECK(mprotect(memory, PageBytes(), PROT_NONE) == 0);
  mapped_ = static_cast<std::byte*>(memory);
  stack_ = mapped_ + PageBytes();
}

Fiber::~Fiber() { munmap(mapped_, PageBytes() + kStackBytes); }

void Fiber::Begin(std::function<void()> body) {
  KEEPSET_CHECK(is_done_);
  body_ = std::move(body);
  is_done_ = false;
}

// setjmp of the library is no choice: AddressSanitizer takes its jumps for the end of frames.
__attribute__((noinline, no_sanitize("address"))) void Fiber::JumpTo(Place* to) {
  __builtin_longjmp(to->words, 1);
}

__attribute__((noinline, no_sanitize("address"))) void Fiber::Switch(Place* from, Place* to) {
  // In another function: the builtins may not meet in one.
  if (__builtin_setjmp(from->words) == 0) JumpTo(to);
}

__attribute__((noinline, no_sanitize("address"))) void Fiber::EnterFirst() {
  ucontext_t context;
  KEEPSET_CHECK(getcontext(&context) == 0);
  context.uc_stack.ss_sp = stack_;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  const auto address = reinterpret_cast<uintptr_t>(this);
  makecontext(&context, reinterpret_cast<void (*)()>(&Fiber::Enter), 2,
              static_cast<unsigned>(uint64_t{address} >> 32), static_cast<unsigned>(address));
  if (__builtin_setjmp(scheduler_.words) == 0) setcontext(&context);
}

void Fiber::Enter(unsigned high, unsigned low) {
  reinterpret_cast<Fiber*>((uintptr_t{high} << 32) | low)->Loop();
}

void Fiber::Loop() {
  FinishSwitch(nullptr, &scheduler_stack_, &scheduler_bytes_);
  while (true) {
    body_();
    is_done_ = true;
    Suspend();
  }
}

void Fiber::Resume() {
  StartSwitch(&scheduler_frames_, stack_, kStackBytes);
  if (has_entered_) {
    Switch(&scheduler_, &here_);
  } else {
    has_entered_ = true;
    EnterFirst();
  }
  FinishSwitch(scheduler_frames_, nullptr, nullptr);
}

void Fiber::Suspend() {
  StartSwitch(&frames_, scheduler_stack_, scheduler_bytes_);
  Switch(&here_, &scheduler_);
  FinishSwitch(frames_, &scheduler_stack_, &scheduler_bytes_);
}

}  // namespace keepset::kernels::cuda
