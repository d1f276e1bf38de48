// SPDX-License-Identifier: Apache-2.0
//
// The loop that all convolutions end in: sums of some rows, each at some vectors, which stay in registers.
#pragma once

#include "cpu/lanes.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

constexpr int kTileOutputs =
    math::kVectorBytes == 64 ? 8 : 4;  // rows for which, times two vectors, there are registers

/// sums[r][v] += Σ_k weight(k, r) · factor(k, v) for k in [0, count), in this order. Both give vectors.
template <int Rows, int Vectors, class Weight, class Factor>
TIMM_EXT_FN void add_products(int64_t count, const Weight& weight, const Factor& factor, V (&sums)[Rows][Vectors]) {
  for (int64_t k = 0; k < count; ++k) {
    V factors[Vectors];
    for (int v = 0; v < Vectors; ++v) factors[v] = factor(k, v);
    for (int r = 0; r < Rows; ++r) {
      const V value = weight(k, r);
      for (int v = 0; v < Vectors; ++v) sums[r][v] += value * factors[v];
    }
  }
}

template <int Rows, int Vectors>
TIMM_EXT_FN void add_sums(const V (&more)[Rows][Vectors], V (&sums)[Rows][Vectors]) {
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) sums[r][v] += more[r][v];
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
