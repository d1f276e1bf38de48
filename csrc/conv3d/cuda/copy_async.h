// SPDX-License-Identifier: Apache-2.0
//
// Copies from global to shared memory that do not hold up the thread, so that many are on their way at a time. GPUs
// before sm_80 and the host executor copy at once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace timm_ext::cuda {

/// kCount floats, 1 or 4 and aligned to as many; zeros where not `inside`, and then `from` need only be an address.
template <int kCount>
__device__ __forceinline__ void copy_async(float* to, const uint32_t* from, bool inside) {
  static_assert(kCount == 1 || kCount == 4, "what the instruction knows");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = inside ? 4 * kCount : 0;
  if constexpr (kCount == 4) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  }
#else
  using Vector = uint4;
  if constexpr (kCount == 4) {
    *reinterpret_cast<Vector*>(to) = inside ? __ldg(reinterpret_cast<const Vector*>(from)) : Vector{0, 0, 0, 0};
  } else {
    *reinterpret_cast<uint32_t*>(to) = inside ? __ldg(from) : 0;
  }
#endif
}

/// Waits until the thread's own copies have arrived.
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace timm_ext::cuda
