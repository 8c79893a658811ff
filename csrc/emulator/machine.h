// One block of CUDA threads on a CPU. The schedules are explained in README.md.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/launch_shape.h"
#include "emulator/fiber.h"

namespace seqrec_fast::emulator {

constexpr int kWarpSize = 32;

enum class Schedule { kLockStep, kGreedy, kRandom };

struct Options {
  Schedule schedule = Schedule::kLockStep;
  uint32_t seed = 0;
  uint64_t first_block = 0;  // of x-major order: a launch too large to run may be run in part
  uint64_t last_block = ~uint64_t{0};
};

// What a kernel did that it must not do.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct Index {
  uint32_t x = 0, y = 0, z = 0;
};

// What a warp does together: given every lane's argument, it writes every lane's result.
struct Collective {
  const char* name;
  void (*run)(void* const* lanes);
};

// 16 bytes on their way from global to shared memory. from is null for zeros.
struct AsyncCopy {
  void* to;
  const void* from;
  void land() const;
};

struct Thread {
  enum class State { kReady, kAtBarrier, kInCollective, kLeft };

  Fiber fiber;
  Index index;
  State state = State::kLeft;
  std::source_location barrier;            // where it waits, when kAtBarrier
  const Collective* collective = nullptr;  // what it waits for, when kInCollective
  void* argument = nullptr;
  std::deque<std::vector<AsyncCopy>> copies;  // one entry a commit; the last is still open
};

class Machine {
 public:
  static Machine& instance();

  // Runs every block of a launch, calling `kernel` once per thread. Throws Error.
  void run(const LaunchShape& shape, const Options& options, const std::function<void()>& kernel);

  // For device code, in a thread:
  Thread& thread() { return *thread_; }
  Index block_index() const { return block_index_; }
  Index block_size() const { return {shape_.threads, 1, 1}; }
  Index grid_size() const { return {shape_.blocks_x, shape_.blocks_y, 1}; }
  unsigned char* shared_memory() { return shared_; }
  void barrier(std::source_location where);
  void collective(const Collective& what, void* argument);
  void copy_async(AsyncCopy copy);
  void commit_copies();
  void wait_for_copies(size_t pending);

 private:
  void run_block();
  void start_threads();
  void check_end_of_block() const;
  bool run_warp(size_t warp);
  bool run_lanes(size_t warp);
  bool run_collective(size_t warp);
  bool release_barrier();
  void resume(Thread& thread);
  void land_some_copies(size_t warp);
  [[noreturn]] void report_deadlock() const;
  void allocate_shared(size_t bytes);
  static void enter(void* machine);

  size_t warps() const { return (shape_.threads + kWarpSize - 1) / kWarpSize; }
  size_t end_of(size_t warp) const;  // the first thread after a warp

  LaunchShape shape_{};
  Options options_;
  const std::function<void()>* kernel_ = nullptr;
  std::mt19937 random_;
  std::vector<std::unique_ptr<Thread>> threads_;  // grows, and keeps its stacks from launch to launch
  Thread* thread_ = nullptr;                      // the running one
  Index block_index_;
  std::unique_ptr<unsigned char[]> memory_;  // guard, shared memory, guard
  unsigned char* shared_ = nullptr;
  std::exception_ptr failure_;  // what a thread threw
};

}  // namespace seqrec_fast::emulator
