// SPDX-License-Identifier: Apache-2.0
//
// Runs CUDA kernels on the host, one fiber per CUDA thread, so that their own source can be tested without a GPU and
// under sanitizers. Blocks run one after another in an order drawn from the seed; inside a block the next thread to
// run is drawn whenever one waits, so that a missing barrier shows up as another result under another seed.
// What CUDA leaves undefined is an error here: a warp operation or barrier that not every named thread reaches,
// threads meeting at different source lines, a thread that ends while others wait for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace timm_ext::executor {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Chooses the schedule of every later launch; the same seed gives the same schedule.
void set_seed(uint64_t seed);

/// Kernel launches since the program started.
int64_t launches();

/// Runs `thread` once for every thread of the grid. Throws Error when the threads cannot all finish.
void run(dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& thread);

/// Shared memory of the running block: one allocation per site, filled with 0xFF (NaN) when the block starts.
void* shared_memory(const void* site, size_t bytes);
void* dynamic_shared_memory();

/// Waits until every lane of `mask` is at this line with this mask; returns the 32 values that they brought.
const uint64_t* warp_exchange(uint32_t mask, uint64_t value, const char* file, int line);
void block_barrier(const char* file, int line);
uint32_t lane();

}  // namespace timm_ext::executor
