#include "emulator/machine.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <sstream>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace seqrec_fast::emulator {

namespace {

constexpr size_t kGuardBytes = 4096;
constexpr unsigned char kGuard = 0xA5;
// NaN as bf16, fp16 and fp32: what is read before it is written spoils the result.
constexpr unsigned char kPoison = 0xFF;

std::string describe(const Index& index) {
  std::ostringstream text;
  text << "(" << index.x << ", " << index.y << ")";
  return text.str();
}

std::string describe(const std::source_location& where) {
  const std::string path = where.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(where.line());
}

}  // namespace

void AsyncCopy::land() const {
  if (from)
    std::memcpy(to, from, 16);
  else
    std::memset(to, 0, 16);
}

Machine& Machine::instance() {
  static Machine machine;
  return machine;
}

size_t Machine::end_of(size_t warp) const { return std::min<size_t>((warp + 1) * kWarpSize, shape_.threads); }

// ---- a launch --------------------------------------------------------------------------------------------

void Machine::run(const LaunchShape& shape, const Options& options, const std::function<void()>& kernel) {
  if (shape.threads < 1 || shape.threads > 1024) throw Error("a block has 1 to 1024 threads");
  if (shape.blocks_x < 1 || int64_t{shape.blocks_x} > kMostBlocksX) throw Error("too few or too many blocks in x");
  if (shape.blocks_y < 1 || int64_t{shape.blocks_y} > kMostBlocksY) throw Error("too few or too many blocks in y");
  shape_ = shape;
  options_ = options;
  kernel_ = &kernel;
  random_.seed(options.seed);
  while (threads_.size() < shape.threads) threads_.push_back(std::make_unique<Thread>());

  const uint64_t end = std::min<uint64_t>(options.last_block, uint64_t{shape.blocks_x} * shape.blocks_y - 1) + 1;
  if (options.first_block >= end) return;
  std::vector<uint64_t> order(end - options.first_block);
  std::iota(order.begin(), order.end(), options.first_block);
  if (options.schedule == Schedule::kGreedy) std::reverse(order.begin(), order.end());
  if (options.schedule == Schedule::kRandom) std::shuffle(order.begin(), order.end(), random_);
  for (const uint64_t block : order) {
    block_index_ = {uint32_t(block % shape.blocks_x), uint32_t(block / shape.blocks_x), 0};
    run_block();
  }
}

void Machine::allocate_shared(size_t bytes) {
  memory_ = std::make_unique<unsigned char[]>(2 * kGuardBytes + bytes + 128);
  unsigned char* start = memory_.get() + kGuardBytes;
  start += (128 - reinterpret_cast<uintptr_t>(start) % 128) % 128;
  std::memset(memory_.get(), kGuard, 2 * kGuardBytes + bytes + 128);
  std::memset(start, kPoison, bytes);
  shared_ = start;
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(shared_ - kGuardBytes, kGuardBytes);
  ASAN_POISON_MEMORY_REGION(shared_ + bytes, kGuardBytes);
#endif
}

void Machine::enter(void* machine) {
  auto& self = *static_cast<Machine*>(machine);
  try {
    (*self.kernel_)();
  } catch (...) {
    self.failure_ = std::current_exception();
  }
  self.thread().state = Thread::State::kLeft;
}

void Machine::start_threads() {
  for (uint32_t i = 0; i < shape_.threads; ++i) {
    Thread& thread = *threads_[i];
    thread.index = {i, 0, 0};
    thread.state = Thread::State::kReady;
    thread.copies.clear();
    thread.copies.emplace_back();
    thread.fiber.start(&Machine::enter, this);
  }
}

void Machine::run_block() {
  allocate_shared(shape_.shared_bytes);
  start_threads();
  std::vector<size_t> order(warps());
  std::iota(order.begin(), order.end(), size_t{0});
  if (options_.schedule == Schedule::kGreedy) std::reverse(order.begin(), order.end());
  const auto left = [&](const auto& thread) { return thread->state == Thread::State::kLeft; };
  while (!std::all_of(threads_.begin(), threads_.begin() + shape_.threads, left)) {
    bool progress = false;
    if (options_.schedule == Schedule::kRandom) std::shuffle(order.begin(), order.end(), random_);
    for (const size_t warp : order) {
      if (options_.schedule == Schedule::kLockStep) {
        progress |= run_warp(warp);
      } else {
        while (run_warp(warp)) progress = true;
        if (progress) break;  // whoever comes first in the order may have been released by now
      }
    }
    progress |= release_barrier();
    if (!progress) report_deadlock();
  }
  check_end_of_block();
}

void Machine::check_end_of_block() const {
  for (uint32_t i = 0; i < shape_.threads; ++i)
    for (const auto& group : threads_[i]->copies)
      if (!group.empty()) throw Error("a thread left with asynchronous copies in flight");
#if !defined(__SANITIZE_ADDRESS__)  // which has reported the write itself, with its place
  const auto intact = [](const unsigned char* guard) {
    return std::all_of(guard, guard + kGuardBytes, [](unsigned char byte) { return byte == kGuard; });
  };
  if (!intact(shared_ - kGuardBytes)) throw Error("a write before the start of shared memory");
  if (!intact(shared_ + shape_.shared_bytes)) throw Error("a write beyond the end of shared memory");
#endif
}

// ---- scheduling ------------------------------------------------------------------------------------------

void Machine::resume(Thread& thread) {
  thread_ = &thread;
  thread.fiber.resume();
  thread_ = nullptr;
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

// Every lane up to its next wait, then, if all are in one, the collective.
bool Machine::run_warp(size_t warp) {
  const bool ran = run_lanes(warp);
  if (options_.schedule == Schedule::kRandom) land_some_copies(warp);
  return run_collective(warp) || ran;
}

bool Machine::run_lanes(size_t warp) {
  bool ran = false;
  const size_t first = warp * kWarpSize, end = end_of(warp);
  for (size_t i = first; i < end; ++i) {
    Thread& thread = *threads_[options_.schedule == Schedule::kGreedy ? end - 1 - (i - first) : i];
    if (thread.state != Thread::State::kReady) continue;
    resume(thread);
    ran = true;
  }
  return ran;
}

bool Machine::run_collective(size_t warp) {
  const size_t first = warp * kWarpSize;
  const Collective* what = threads_[first]->collective;
  void* lanes[kWarpSize];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (first + lane >= shape_.threads || threads_[first + lane]->state != Thread::State::kInCollective) return false;
    lanes[lane] = threads_[first + lane]->argument;
    if (threads_[first + lane]->collective != what)
      throw Error(std::string("the lanes of a warp diverged: one is in ") + what->name + ", another in " +
                  threads_[first + lane]->collective->name);
  }
  what->run(lanes);
  for (int lane = 0; lane < kWarpSize; ++lane) threads_[first + lane]->state = Thread::State::kReady;
  return true;
}

bool Machine::release_barrier() {
  const Thread* waiting = nullptr;
  for (uint32_t i = 0; i < shape_.threads; ++i)
    if (threads_[i]->state == Thread::State::kAtBarrier) waiting = threads_[i].get();
  if (!waiting) return false;
  for (uint32_t i = 0; i < shape_.threads; ++i) {
    const Thread& thread = *threads_[i];
    if (thread.state == Thread::State::kLeft)
      throw Error("__syncthreads() at " + describe(waiting->barrier) + " is not reached by every thread: one has left");
    if (thread.state != Thread::State::kAtBarrier) return false;
  }
  for (uint32_t i = 0; i < shape_.threads; ++i) {
    Thread& thread = *threads_[i];
    if (thread.barrier.line() != waiting->barrier.line() || thread.barrier.column() != waiting->barrier.column())
      throw Error("the threads of a block wait at different __syncthreads(): " + describe(thread.barrier) + " and " +
                  describe(waiting->barrier));
    thread.state = Thread::State::kReady;
  }
  return true;
}

void Machine::report_deadlock() const {
  std::ostringstream text;
  text << "deadlock in block " << describe(block_index_) << ":";
  for (size_t warp = 0; warp < warps(); ++warp) {
    int at_barrier = 0, in_collective = 0, left = 0;
    for (size_t i = warp * kWarpSize; i < end_of(warp); ++i) {
      at_barrier += threads_[i]->state == Thread::State::kAtBarrier;
      in_collective += threads_[i]->state == Thread::State::kInCollective;
      left += threads_[i]->state == Thread::State::kLeft;
    }
    text << " warp " << warp << " has " << at_barrier << " threads at a barrier, " << in_collective
         << " in a warp operation and " << left << " that left;";
  }
  throw Error(text.str());
}

// ---- what threads call -----------------------------------------------------------------------------------

void Machine::barrier(std::source_location where) {
  thread_->barrier = where;
  thread_->state = Thread::State::kAtBarrier;
  Fiber::suspend();
}

void Machine::collective(const Collective& what, void* argument) {
  thread_->collective = &what;
  thread_->argument = argument;
  thread_->state = Thread::State::kInCollective;
  Fiber::suspend();
}

void Machine::copy_async(AsyncCopy copy) {
  if (options_.schedule == Schedule::kLockStep)
    copy.land();
  else
    thread_->copies.back().push_back(copy);
}

void Machine::commit_copies() { thread_->copies.emplace_back(); }

void Machine::wait_for_copies(size_t pending) {
  auto& copies = thread_->copies;
  while (copies.size() > pending + 1) {  // the open group is not counted
    for (const AsyncCopy& copy : copies.front()) copy.land();
    copies.pop_front();
  }
}

void Machine::land_some_copies(size_t warp) {
  for (size_t i = warp * kWarpSize; i < end_of(warp); ++i)
    for (auto& group : threads_[i]->copies)
      std::erase_if(group, [&](const AsyncCopy& copy) {
        const bool now = random_() % 4 == 0;
        if (now) copy.land();
        return now;
      });
}

}  // namespace seqrec_fast::emulator
