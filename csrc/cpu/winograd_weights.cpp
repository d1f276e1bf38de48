// SPDX-License-Identifier: Apache-2.0
#include "winograd.h"

namespace timm_ext::cpu {
namespace {

/// Of three weights, the factors of the four products.
void weight_forms(float g0, float g1, float g2, float (&to)[4]) {
  const float outer = 0.5f * (g0 + g2), middle = 0.5f * g1;
  to[0] = g0;
  to[1] = outer + middle;
  to[2] = outer - middle;
  to[3] = g2;
}

/// Of one column of an output's kernel, all forms, `form` elements apart.
void write_forms(const float* weight, int64_t columns, float* to, int64_t form) {
  float rows[3][4];  // [planes of the kernel, forms over its rows]
  for (int64_t d = 0; d < 3; ++d) {
    const float* const g = weight + d * 3 * columns;
    weight_forms(g[0], g[columns], g[2 * columns], rows[d]);
  }
  for (int64_t h = 0; h < 4; ++h) {
    float forms[4];
    weight_forms(rows[0][h], rows[1][h], rows[2][h], forms);
    for (int64_t d = 0; d < 4; ++d) to[(4 * d + h) * form] = forms[d];
  }
}

}  // namespace

void winograd_weights(const ConvShape& s, const float* weight, float* forms, int64_t first_block, int64_t last_block) {
  const int64_t columns = s.kernel[2], form = s.inputs * columns * kWinogradOutputs;
  for (int64_t block = first_block; block < last_block; ++block) {
    for (int64_t o = 0; o < kWinogradOutputs; ++o) {
      const int64_t output = block * kWinogradOutputs + o;
      float* to = forms + block * winograd_block_elements(s) + o;
      for (int64_t i = 0; i < s.inputs; ++i) {
        const float* const from = weight + (output * s.inputs + i) * 9 * columns;
        for (int64_t w = 0; w < columns; ++w, to += kWinogradOutputs) {
          if (output < s.outputs) {
            write_forms(from + w, columns, to, form);
          } else {
            for (int64_t f = 0; f < kForms2; ++f) to[f * form] = 0.0f;
          }
        }
      }
    }
  }
}

}  // namespace timm_ext::cpu
