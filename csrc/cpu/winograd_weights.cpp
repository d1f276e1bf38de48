// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "winograd.h"

namespace timm_ext::cpu {
namespace {

constexpr int64_t kO = kWinogradOutputs;

/// Of three weights of each output, the factors of the four products.
void weight_forms(const float (&g0)[kO], const float (&g1)[kO], const float (&g2)[kO], float* const (&to)[4]) {
  for (int64_t o = 0; o < kO; ++o) {
    const float outer = 0.5f * (g0[o] + g2[o]), middle = 0.5f * g1[o];
    to[0][o] = g0[o];
    to[1][o] = outer + middle;
    to[2][o] = outer - middle;
    to[3][o] = g2[o];
  }
}

/// All forms, `form` elements apart, of one column of the kernels between an input and a block of outputs.
void write_forms(const float (&g)[9][kO], float* to, int64_t form) {
  float rows[3][4][kO];  // [planes of the kernel, forms over its rows]
  for (int d = 0; d < 3; ++d) {
    weight_forms(g[3 * d], g[3 * d + 1], g[3 * d + 2], {rows[d][0], rows[d][1], rows[d][2], rows[d][3]});
  }
  for (int64_t h = 0; h < 4; ++h) {
    float* const first = to + h * form;
    weight_forms(rows[0][h], rows[1][h], rows[2][h], {first, first + 4 * form, first + 8 * form, first + 12 * form});
  }
}

}  // namespace

void winograd_weights(const ConvShape& s, const float* weight, float* forms, int64_t first_block, int64_t last_block) {
  const int64_t columns = s.kernel[2], taps = 9 * columns;
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t first = block * kO, outputs = std::min(kO, s.outputs - first);
    float* to = forms + block * winograd_block_elements(s);
    for (int64_t i = 0; i < s.inputs; ++i) {
      for (int64_t w = 0; w < columns; ++w, to += kO) {
        float g[9][kO] = {};
        for (int64_t o = 0; o < outputs; ++o) {
          const float* const from = weight + ((first + o) * s.inputs + i) * taps + w;
          for (int64_t tap = 0; tap < 9; ++tap) g[tap][o] = from[tap * columns];
        }
        write_forms(g, to, s.inputs * columns * kO);
      }
    }
  }
}

}  // namespace timm_ext::cpu
