// SPDX-License-Identifier: Apache-2.0
#include "tests/executor/executor.h"

#include <algorithm>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "tests/executor/fiber.h"

#if defined(TIMM_EXT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define __sanitizer_start_switch_fiber(save, bottom, size) ((void)(bottom), (void)(size))
#define __sanitizer_finish_switch_fiber(save, bottom, size) ((void)(bottom), (void)(size))
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace timm_ext::executor {
namespace {

constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = size_t{48} << 10;

struct Executor {
  uint64_t seed = 0;
  int64_t launches = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  unsigned count = 0;  // threads of the running block
  unsigned current = 0;
  std::vector<unsigned> runnable;
  const std::function<void()>* thread = nullptr;
  std::exception_ptr failure;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::map<const void*, std::unique_ptr<unsigned char[]>> shared;
  std::unique_ptr<unsigned char[]> dynamic_shared;
  size_t shared_bytes = 0;
};
Executor executor;

Fiber& running() { return *executor.fibers[executor.current]; }

void yield_to_scheduler(bool last) {
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack, executor.scheduler_stack,
                                 executor.scheduler_stack_bytes);
  swapcontext(&running().context, &executor.scheduler);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void resume(unsigned index) {
  Fiber& fiber = *executor.fibers[index];
  executor.current = index;
  threadIdx = dim3(index % blockDim.x, index / blockDim.x % blockDim.y, index / (blockDim.x * blockDim.y));
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack + kPage, kStackBytes - kPage);
  swapcontext(&executor.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &executor.scheduler_stack, &executor.scheduler_stack_bytes);
  try {
    (*executor.thread)();
  } catch (...) {
    executor.failure = std::current_exception();
  }
  running().state = State::kFinished;
  yield_to_scheduler(true);
}

void start_fiber(Fiber& fiber) {
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack + kPage, kStackBytes - kPage);  // frames that a failed launch left
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack + kPage;
  fiber.context.uc_stack.ss_size = kStackBytes - kPage;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  fiber.context.uc_stack.ss_size = 0;  // else AddressSanitizer forgets the stack's red zones at every switch
  fiber.state = State::kRunnable;
  fiber.site = {};
}

/// Throws with the state of the block, threads in the same state put together.
[[noreturn]] void fail(const std::string& what) {
  std::string text = what + " in block " + std::to_string(blockIdx.x) + ":";
  for (unsigned first = 0, next; first < executor.count; first = next) {
    const Fiber& fiber = *executor.fibers[first];
    for (next = first + 1; next < executor.count; ++next) {
      const Fiber& other = *executor.fibers[next];
      if (other.state != fiber.state || !(other.site == fiber.site)) break;
    }
    text += "\n  threads " + std::to_string(first) + "-" + std::to_string(next - 1) + " " +
            kStateNames[static_cast<int>(fiber.state)];
    if (fiber.site.line) text += ", line " + std::to_string(fiber.site.line);
  }
  throw Error(text);
}

/// Lets the warp of the running fiber go on if every lane of its mask waits at the same operation.
void release_warp() {
  const Fiber& self = running();
  const unsigned first = executor.current / kWarp * kWarp;
  const auto member = [&](unsigned i) -> Fiber* {
    return first + i < executor.count && (self.mask >> i & 1) ? executor.fibers[first + i].get() : nullptr;
  };
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(self.mask >> i & 1)) continue;
    const Fiber* other = member(i);
    if (!other || other->state == State::kFinished) fail("divergence: warp operation names a lane that has ended");
    if (other->state == State::kAtBarrier) fail("divergence: warp operation names a lane that waits at a barrier");
    if (other->state == State::kRunnable) return;
    if (other->mask != self.mask || !(other->site == self.site)) fail("divergence: lanes wait at different operations");
  }
  uint64_t values[kWarp] = {};
  for (unsigned i = 0; i < kWarp; ++i) {
    if (const Fiber* other = member(i)) values[i] = other->value;
  }
  for (unsigned i = 0; i < kWarp; ++i) {
    if (Fiber* other = member(i)) {
      std::copy(values, values + kWarp, other->gathered);
      other->state = State::kRunnable;
      executor.runnable.push_back(first + i);
    }
  }
}

void release_barrier() {
  for (unsigned i = 0; i < executor.count; ++i) {
    const Fiber& fiber = *executor.fibers[i];
    if (fiber.state != State::kAtBarrier) return;
    if (!(fiber.site == running().site)) fail("divergence: threads wait at different barriers");
  }
  for (unsigned i = 0; i < executor.count; ++i) {
    executor.fibers[i]->state = State::kRunnable;
    executor.runnable.push_back(i);
  }
}

std::unique_ptr<unsigned char[]> poisoned(size_t bytes) {
  executor.shared_bytes += bytes;
  if (executor.shared_bytes > kMaxSharedBytes) throw Error("block uses more than 48 KiB of shared memory");
  std::unique_ptr<unsigned char[]> memory(new unsigned char[bytes]);
  std::fill_n(memory.get(), bytes, static_cast<unsigned char>(0xFF));
  return memory;
}

void run_block(std::mt19937_64& random, size_t dynamic_shared_bytes) {
  executor.shared.clear();
  executor.shared_bytes = 0;
  executor.dynamic_shared = poisoned(dynamic_shared_bytes);
  executor.runnable.clear();
  for (unsigned i = 0; i < executor.count; ++i) {
    start_fiber(*executor.fibers[i]);
    executor.runnable.push_back(i);
  }
  while (!executor.runnable.empty()) {
    std::swap(executor.runnable[random() % executor.runnable.size()], executor.runnable.back());
    const unsigned next = executor.runnable.back();
    executor.runnable.pop_back();
    resume(next);
    if (executor.failure) std::rethrow_exception(std::exchange(executor.failure, nullptr));
    if (running().state == State::kAtWarpOperation) release_warp();
    if (running().state == State::kAtBarrier) release_barrier();
  }
  for (unsigned i = 0; i < executor.count; ++i) {
    if (executor.fibers[i]->state != State::kFinished) fail("divergence: threads wait for each other");
  }
}

void wait(State state, const char* file, int line) {
  running().state = state;
  running().site = {file, line};
  yield_to_scheduler(false);
}

}  // namespace

void set_seed(uint64_t seed) { executor.seed = seed; }
int64_t launches() { return executor.launches; }
uint32_t lane() { return executor.current % kWarp; }

void run(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& thread) {
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  executor.count = block.x * block.y * block.z;
  if (blocks == 0 || executor.count == 0 || executor.count > kMaxThreads) throw Error("invalid launch configuration");
  while (executor.fibers.size() < executor.count) executor.fibers.push_back(std::make_unique<Fiber>());
  executor.thread = &thread;
  gridDim = grid;
  blockDim = block;
  std::mt19937_64 random(executor.seed * 0x9E3779B97F4A7C15u + executor.launches++);
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  for (uint64_t i : order) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / (uint64_t{grid.x} * grid.y));
    run_block(random, dynamic_shared_bytes);
  }
}

void* shared_memory(const void* site, size_t bytes) {
  auto& memory = executor.shared[site];
  if (!memory) memory = poisoned(bytes);
  return memory.get();
}

void* dynamic_shared_memory() { return executor.dynamic_shared.get(); }

const uint64_t* warp_exchange(uint32_t mask, uint64_t value, const char* file, int line) {
  if (!(mask >> lane() & 1)) throw Error("warp operation called by a lane outside its mask");
  running().mask = mask;
  running().value = value;
  wait(State::kAtWarpOperation, file, line);
  return running().gathered;
}

void block_barrier(const char* file, int line) { wait(State::kAtBarrier, file, line); }

}  // namespace timm_ext::executor
