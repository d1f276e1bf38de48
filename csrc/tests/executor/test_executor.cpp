// SPDX-License-Identifier: Apache-2.0
//
// The executor must find each planted bug, and nothing in a right kernel. Bugs that a sanitizer reports end the
// process: `test_executor NAME` plants that one, and CTest looks for the report.
#include <cuda_runtime.h>

#include <cmath>
#include <functional>
#include <memory>
#include <string>

#include "cuda/launch.h"
#include "tests/check.h"

namespace {

using timm_ext::cuda::launch;
using timm_ext::test::check;

constexpr unsigned kThreads = 96;

/// Sum of one value per thread through shared memory; the flags plant the bugs.
template <bool kBarrier, bool kInitialised>
__global__ void block_sum(const float* values, float* sum) {
  TIMM_EXT_SHARED(float, slots, kThreads);
  if (kInitialised || threadIdx.x > 0) slots[threadIdx.x] = values[blockIdx.x * kThreads + threadIdx.x];
  if (kBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (unsigned i = 0; i < kThreads; ++i) total += slots[i];
    sum[blockIdx.x] = total;
  }
}

__global__ void warp_sum(float* values) {
  float value = values[blockIdx.x * blockDim.x + threadIdx.x];
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  values[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

__global__ void half_warp_shuffles(float* values) {
  if (threadIdx.x < 16) values[threadIdx.x] = __shfl_xor_sync(~0u, values[threadIdx.x], 1);
}

__global__ void branches_shuffle_apart(float* values) {
  if (threadIdx.x < 16) {
    values[threadIdx.x] = __shfl_xor_sync(~0u, values[threadIdx.x], 1);
  } else {
    values[threadIdx.x] = __shfl_xor_sync(~0u, values[threadIdx.x], 2);
  }
}

__global__ void shuffle_outside_mask(float* values) {
  if (threadIdx.x < 16) values[threadIdx.x] = __shfl_xor_sync(0xFFFFu, values[threadIdx.x], 16);
}

__global__ void barrier_in_a_branch(float* values) {
  if (threadIdx.x < 32) __syncthreads();
  values[threadIdx.x] = 0;
}

__global__ void barriers_apart() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void warp_waits_for_barrier(float* values) {
  if (threadIdx.x < 16) __syncthreads();
  values[threadIdx.x] = __shfl_xor_sync(~0u, values[threadIdx.x], 1);
  if (threadIdx.x >= 16) __syncthreads();
}

__global__ void off_by_one(float* values, int count) {
  for (int i = threadIdx.x; i <= count; i += blockDim.x) values[i] = 1;
}

__global__ void unguarded_tail(const float* values, uint4* out, int count) {
  const int first = 4 * threadIdx.x;
  if (first < count) *out = *reinterpret_cast<const uint4*>(values + first);
}

__global__ void misaligned_vector(const float* values, uint4* out) {
  *out = *reinterpret_cast<const uint4*>(values + 1);
}

__global__ void shared_overrun(float* out) {
  TIMM_EXT_SHARED(float, slots, kThreads);
  slots[threadIdx.x + 1] = 1;
  *out = slots[threadIdx.x + 1];
}

__global__ void dynamic_overrun(float* out) {
  TIMM_EXT_DYNAMIC_SHARED(float, slots);
  slots[threadIdx.x + 1] = 1;
  *out = slots[threadIdx.x + 1];
}

std::string message(const std::function<void()>& run) {
  try {
    run();
  } catch (const timm_ext::executor::Error& error) {
    return error.what();
  }
  return "";
}

void expect_error(const char* what, const std::function<void()>& run) {
  for (uint64_t seed = 0; seed < 8; ++seed) {
    timm_ext::executor::set_seed(seed);
    const std::string text = message(run);
    check(text.find(what) != std::string::npos, "expected '%s', got '%s'", what, text.c_str());
  }
}

template <bool kBarrier, bool kInitialised>
int wrong_sums(int seeds) {
  constexpr unsigned kBlocks = 3;
  std::unique_ptr<float[]> values(new float[kBlocks * kThreads]);
  for (unsigned i = 0; i < kBlocks * kThreads; ++i) values[i] = 1;
  int wrong = 0;
  for (int seed = 0; seed < seeds; ++seed) {
    timm_ext::executor::set_seed(seed);
    float sums[kBlocks];
    launch(block_sum<kBarrier, kInitialised>, kBlocks, kThreads, nullptr, values.get(), sums);
    for (float sum : sums) wrong += sum != kThreads;
  }
  return wrong;
}

void test_right_kernels() {
  check(wrong_sums<true, true>(8) == 0, "a right block sum was wrong");
  float values[64];
  for (int i = 0; i < 64; ++i) values[i] = i;
  launch(warp_sum, 1, 64, nullptr, values);
  for (int i = 0; i < 64; ++i) check(values[i] == (i < 32 ? 496 : 1520), "warp sum of lane %d is %g", i, values[i]);
  check(message([&] { launch(warp_sum, 0, 32, nullptr, values); }) == "invalid launch configuration", "empty grid");
  const timm_ext::cuda::Grid greedy = {1, 32, (size_t{48} << 10) + 1};
  check(message([&] { launch(warp_sum, greedy, nullptr, values); }).find("48 KiB") != std::string::npos,
        "greedy block");
}

void test_wrong_results() {
  check(wrong_sums<false, true>(8) > 0, "a missing barrier went unnoticed");
  check(wrong_sums<true, false>(1) == 3, "uninitialised shared memory went unnoticed");
}

void test_divergence() {
  float values[64] = {};
  float* const v = values;
  expect_error("divergence", [v] { launch(half_warp_shuffles, 1, 32, nullptr, v); });
  expect_error("divergence", [v] { launch(branches_shuffle_apart, 1, 32, nullptr, v); });
  expect_error("outside its mask", [v] { launch(shuffle_outside_mask, 1, 32, nullptr, v); });
  expect_error("divergence", [v] { launch(barrier_in_a_branch, 1, 64, nullptr, v); });
  expect_error("divergence", [] { launch(barriers_apart, 1, 64, nullptr); });
  expect_error("divergence", [v] { launch(warp_waits_for_barrier, 1, 32, nullptr, v); });
}

void plant(const std::string& name) {
  constexpr int kCount = 130;
  std::unique_ptr<float[]> values(new float[kCount]());
  uint4 vector;
  if (name == "off_by_one") launch(off_by_one, 1, 32, nullptr, values.get(), kCount);
  if (name == "unguarded_tail") launch(unguarded_tail, 1, 64, nullptr, values.get(), &vector, kCount);
  if (name == "misaligned_vector") launch(misaligned_vector, 1, 32, nullptr, values.get(), &vector);
  if (name == "shared_overrun") launch(shared_overrun, 1, kThreads, nullptr, values.get());
  const timm_ext::cuda::Grid grid = {1, kThreads, kThreads * sizeof(float)};
  if (name == "dynamic_overrun") launch(dynamic_overrun, grid, nullptr, values.get());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    plant(argv[1]);
    return 0;
  }
  test_right_kernels();
  test_wrong_results();
  test_divergence();
  return timm_ext::test::result();
}
