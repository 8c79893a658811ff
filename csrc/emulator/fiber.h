// A fiber: a function with a stack of its own that can be left in the middle and resumed.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace seqrec_fast::emulator {

class Fiber {
 public:
  Fiber() {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuardBytes, PROT_NONE);  // an overflow faults instead of reaching the neighbour's stack
    memory_ = static_cast<char*>(memory);
  }
  ~Fiber() { munmap(memory_, kGuardBytes + kStackBytes); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls entry(argument), which must not throw. A fiber that was left in the middle may be started
  // anew.
  void start(void (*entry)(void*), void* argument) {
    entry_ = entry;
    argument_ = argument;
    finished_ = false;
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack();
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, &Fiber::run, 0);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(stack(), kStackBytes);
    fake_stack_ = nullptr;
#endif
  }

  // Runs until the function returns or suspends. From outside any fiber.
  void resume() {
    current_ = this;
    leave_for(&outside_fake_stack_, stack(), kStackBytes);
    swapcontext(&outside_, &context_);
    arrive_from(outside_fake_stack_);
    current_ = nullptr;
  }

  // Leaves the running fiber.
  static void suspend() {
    Fiber& self = *current_;
    leave_for(&self.fake_stack_, outside_stack_, outside_stack_bytes_);
    swapcontext(&self.context_, &outside_);
    arrive_from(self.fake_stack_);
  }

  bool finished() const { return finished_; }

 private:
  static constexpr size_t kGuardBytes = 1 << 16;
  static constexpr size_t kStackBytes = 1 << 18;  // the sanitizers' stack frames are large

  char* stack() const { return memory_ + kGuardBytes; }

  static void run() {
    arrive_from(nullptr);
    Fiber& self = *current_;
    self.entry_(self.argument_);
    self.finished_ = true;
    leave_for(nullptr, outside_stack_, outside_stack_bytes_);  // null: this stack is not needed again
    setcontext(&outside_);
  }

  // AddressSanitizer must know which stack is in use.
#if defined(__SANITIZE_ADDRESS__)
  static void leave_for(void** fake_stack, const void* stack, size_t bytes) {
    __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
  }
  static void arrive_from(void* fake_stack) {
    const void* stack = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fake_stack, &stack, &bytes);
    if (current_ && !current_->finished_ && stack != current_->stack()) {  // we came from outside
      outside_stack_ = stack;
      outside_stack_bytes_ = bytes;
    }
  }
#else
  static void leave_for(void**, const void*, size_t) {}
  static void arrive_from(void*) {}
#endif

  char* memory_ = nullptr;
  ucontext_t context_{};
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  void* fake_stack_ = nullptr;
  bool finished_ = true;

  inline static Fiber* current_ = nullptr;
  inline static ucontext_t outside_{};
  inline static void* outside_fake_stack_ = nullptr;
  inline static const void* outside_stack_ = nullptr;
  inline static size_t outside_stack_bytes_ = 0;
};

}  // namespace seqrec_fast::emulator
