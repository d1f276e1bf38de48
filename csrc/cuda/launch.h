// SPDX-License-Identifier: Apache-2.0
//
// How kernels are launched and shared memory is named, so that the same source also runs in the host executor of
// csrc/tests, where no launch syntax and no shared memory exist.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace timm_ext::cuda {

#ifdef __CUDACC__
#define TIMM_EXT_SHARED(type, name, count) __shared__ type name[count]
#define TIMM_EXT_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#define TIMM_EXT_UNROLL _Pragma("unroll")
#define TIMM_EXT_NO_UNROLL _Pragma("unroll 1")
#define TIMM_EXT_UNROLL_BY_EIGHT _Pragma("unroll 8")
#else
#define TIMM_EXT_UNROLL
#define TIMM_EXT_NO_UNROLL
#define TIMM_EXT_UNROLL_BY_EIGHT
#define TIMM_EXT_SHARED(type, name, count) \
  static const char name##_site = 0;       \
  type* const name = static_cast<type*>(::timm_ext::executor::shared_memory(&name##_site, sizeof(type) * (count)))
#define TIMM_EXT_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::timm_ext::executor::dynamic_shared_memory())
#endif

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

/// Sum over the warp, the same in every lane, in a fixed order.
template <class V>
__device__ __forceinline__ V warp_sum(V value) {
  TIMM_EXT_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

/// Blocks for `units` of work at `units_per_block`; kernels loop with a grid stride over what is beyond the limit.
inline unsigned grid_size(int64_t units, int64_t units_per_block) {
  constexpr int64_t kMaxBlocks = int64_t{1} << 30;
  const int64_t blocks = (units + units_per_block - 1) / units_per_block;
  return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

/// Blocks, threads of each, and bytes of dynamic shared memory of each.
struct Grid {
  unsigned blocks, threads;
  size_t shared_bytes = 0;
};

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), const Grid& grid, void* stream, Arguments... arguments) {
#ifdef __CUDACC__
  kernel<<<grid.blocks, grid.threads, grid.shared_bytes, static_cast<cudaStream_t>(stream)>>>(Parameters(arguments)...);
  return static_cast<int>(cudaGetLastError());
#else
  (void)stream;
  ::timm_ext::executor::run(grid.blocks, grid.threads, grid.shared_bytes, [&] { kernel(Parameters(arguments)...); });
  return 0;
#endif
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, void* stream, Arguments... arguments) {
  return launch(kernel, Grid{blocks, threads}, stream, arguments...);
}

}  // namespace timm_ext::cuda
