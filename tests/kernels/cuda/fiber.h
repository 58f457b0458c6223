// Threads of an emulated block: functions with stacks of their own, of which one runs at a time and
// says itself when another one may. A change of stacks enters no kernel of the operating system,
// and AddressSanitizer is told of it.
#ifndef KEEPSET_TESTS_KERNELS_CUDA_FIBER_H_
#define KEEPSET_TESTS_KERNELS_CUDA_FIBER_H_

#include <cstddef>
#include <deque>
#include <functional>

namespace keepset::kernels::cuda {

// Used by the thread that made it, and by no other one. The page below its stack is inaccessible.
class Fiber {
 public:
  static constexpr size_t kStackBytes = size_t{128} << 10;

  Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // `body` runs at the next Resume. What it was given before has ended, or will not run any
  // further.
  void Begin(std::function<void()> body);
  // Until the body suspends itself or ends.
  void Resume();
  bool is_done() const { return is_done_; }
  // By the body.
  void Suspend();
  const std::byte* stack() const { return stack_; }

 private:
  // Of __builtin_setjmp.
  struct Place {
    void* words[5];
  };
  static void JumpTo(Place* to);
  static void Switch(Place* from, Place* to);
  static void Enter(unsigned high, unsigned low);
  void EnterFirst();
  void Loop();

  std::byte* mapped_;
  std::byte* stack_;
  bool has_entered_ = false;
  bool is_done_ = true;
  std::function<void()> body_;
  Place here_;
  Place scheduler_;
  // As AddressSanitizer knows them.
  void* frames_ = nullptr;
  void* scheduler_frames_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_bytes_ = 0;
};

// Fibers of one thread of the host, which are used again and again.
class FiberPool {
 public:
  // Stays where it is.
  Fiber& At(size_t index) {
    while (fibers_.size() <= index) fibers_.emplace_back();
    return fibers_[index];
  }

 private:
  std::deque<Fiber> fibers_;
};

}  // namespace keepset::kernels::cuda

#endif  // KEEPSET_TESTS_KERNELS_CUDA_FIBER_H_
