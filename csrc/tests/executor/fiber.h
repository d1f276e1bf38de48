// SPDX-License-Identifier: Apache-2.0
//
// The threads of the host executor.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tests/executor/executor.h"

namespace timm_ext::executor {

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = size_t{512} << 10;
constexpr unsigned kWarp = 32;

enum class State { kRunnable, kAtWarpOperation, kAtBarrier, kFinished };
inline const char* const kStateNames[] = {"running", "at a warp operation", "at a barrier", "finished"};

struct Site {
  const char* file = "";
  int line = 0;
  bool operator==(const Site& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }
};

/// One CUDA thread. Its stack lives as long as the program and is used again by later launches.
struct Fiber {
  ucontext_t context;
  char* stack = nullptr;
  State state = State::kFinished;
  Site site;
  uint32_t mask = 0;
  uint64_t value = 0;
  uint64_t gathered[kWarp];

  Fiber() {
    void* memory =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Error("no memory for the stack of a fiber");
    mprotect(memory, kPage, PROT_NONE);
    stack = static_cast<char*>(memory);
  }
  ~Fiber() { munmap(stack, kStackBytes); }
  Fiber(const Fiber&) = delete;
};

}  // namespace timm_ext::executor
