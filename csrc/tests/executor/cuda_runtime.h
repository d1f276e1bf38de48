// SPDX-License-Identifier: Apache-2.0
//
// The part of the CUDA runtime that the kernels use, for g++: found in place of CUDA's own header by the include path.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tests/executor/executor.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "error"; }

#define TIMM_EXT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(TIMM_EXT_SITE) { timm_ext::executor::block_barrier(file, line); }
inline void __syncwarp(uint32_t mask = ~0u, TIMM_EXT_SITE) { timm_ext::executor::warp_exchange(mask, 0, file, line); }

namespace timm_ext::executor {

template <class T>
uint64_t to_slot(T value) {
  static_assert(sizeof(T) <= 8, "warp operations move at most 8 bytes");
  uint64_t slot = 0;
  std::memcpy(&slot, &value, sizeof(T));
  return slot;
}

/// The value of lane `source`; reading a lane outside the mask is undefined in CUDA and an error here.
template <class T>
T read_lane(uint32_t mask, T value, uint32_t source, const char* file, int line) {
  const uint64_t* slots = warp_exchange(mask, to_slot(value), file, line);
  if (!(mask >> source & 1)) throw Error("shuffle reads a lane outside its mask");
  std::memcpy(&value, &slots[source], sizeof(T));
  return value;
}

}  // namespace timm_ext::executor

template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, TIMM_EXT_SITE) {
  const uint32_t first = timm_ext::executor::lane() & ~(width - 1);
  return timm_ext::executor::read_lane(mask, value, first + (source & (width - 1)), file, line);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, TIMM_EXT_SITE) {
  const uint32_t lane = timm_ext::executor::lane(), source = lane ^ bits;
  return timm_ext::executor::read_lane(mask, value, source / width > lane / width ? lane : source, file, line);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, TIMM_EXT_SITE) {
  const uint32_t lane = timm_ext::executor::lane(), source = lane + delta;
  return timm_ext::executor::read_lane(mask, value, source / width != lane / width ? lane : source, file, line);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, TIMM_EXT_SITE) {
  const uint32_t lane = timm_ext::executor::lane();
  return timm_ext::executor::read_lane(mask, value, lane % width < delta ? lane : lane - delta, file, line);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate, TIMM_EXT_SITE) {
  const uint64_t* slots = timm_ext::executor::warp_exchange(mask, predicate != 0, file, line);
  uint32_t votes = 0;
  for (int i = 0; i < 32; ++i) votes |= (mask >> i & 1 && slots[i]) ? 1u << i : 0u;
  return votes;
}
inline int __any_sync(uint32_t mask, int predicate, TIMM_EXT_SITE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, TIMM_EXT_SITE) {
  return __ballot_sync(mask, predicate, file, line) == mask;
}

#undef TIMM_EXT_SITE

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(bits) : 32; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
