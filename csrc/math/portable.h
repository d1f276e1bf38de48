// SPDX-License-Identifier: Apache-2.0
//
// Function attribute of everything in this folder. Always inlined: the same header is compiled once per instruction
// set, and the linker must never pick the copy of another one.
#pragma once

#if defined(__CUDACC__)
#define TIMM_EXT_FN __host__ __device__ __forceinline__
#else
#define TIMM_EXT_FN inline __attribute__((always_inline))
#endif
