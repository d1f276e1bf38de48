// SPDX-License-Identifier: Apache-2.0
//
// Counter-based random numbers: Philox 4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011).
// Draw i of a key stands at a fixed place whatever is drawn beside it, on every device: of the blocks of four numbers
// that the generator gives, 16 neighbouring ones hold 64 draws, first the first number of each, then the second, …, so
// that vectors of up to 16 lanes store them as they come.
#pragma once

#include "math/scalar.h"
#if !defined(__CUDACC__)
#include "math/simd.h"
#endif

namespace timm_ext::math {

constexpr int kDrawsPerBlock = 4;
constexpr int kBlocksPerGroup = 16;
constexpr int kDrawsPerGroup = kDrawsPerBlock * kBlocksPerGroup;

/// The four numbers of block `low + 2^32 high` of a key, of uint32_t or a vector of them, in place of `x`.
template <class U>
TIMM_EXT_FN void philox(U low, U high, uint64_t key, U (&x)[kDrawsPerBlock]) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  x[0] = low;
  x[1] = high;
  x[2] = x[3] = U{};
  for (int round = 0; round < 10; ++round) {
    U high0, low0, high1, low1;
    wide_product(x[0], 0xD2511F53u, high0, low0);
    wide_product(x[2], 0xCD9E8D57u, high1, low1);
    x[0] = high1 ^ x[1] ^ k0;
    x[1] = low1;
    x[2] = high0 ^ x[3] ^ k1;
    x[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace timm_ext::math
