// SPDX-License-Identifier: Apache-2.0
#include "conv3d/cpu/kernels.h"
#include "conv3d/cpu/transpose_taps.h"
#include "cpu/buffer.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int64_t kO = kWinogradOutputs;
static_assert(kO == kTapOutputs);

/// Of three weights of each output, the factors of the four products.
TIMM_EXT_FN void weight_forms(const float* g0, const float* g1, const float* g2, float* const (&to)[4]) {
  for (int64_t o = 0; o < kO; ++o) {
    const float outer = 0.5f * (g0[o] + g2[o]), middle = 0.5f * g1[o];
    to[0][o] = g0[o];
    to[1][o] = outer + middle;
    to[2][o] = outer - middle;
    to[3][o] = g2[o];
  }
}

/// All forms, `form` elements apart, of the places g[0 … 8 · step] of a column of the kernels.
TIMM_EXT_FN void write_forms(const float* g, int64_t step, float* to, int64_t form) {
  float rows[3][4][kO];  // [planes of the kernel, forms over its rows]
  for (int64_t d = 0; d < 3; ++d) {
    const float* const plane = g + 3 * d * step;
    weight_forms(plane, plane + step, plane + 2 * step, {rows[d][0], rows[d][1], rows[d][2], rows[d][3]});
  }
  for (int64_t h = 0; h < 4; ++h) {
    float* const first = to + h * form;
    weight_forms(rows[0][h], rows[1][h], rows[2][h], {first, first + 4 * form, first + 8 * form, first + 12 * form});
  }
}

}  // namespace

void winograd_weights(const WinogradWeights& w, int64_t first_block, int64_t last_block) {
  const ConvShape& s = *w.shape;
  const int64_t columns = s.kernel[2], taps = 9 * columns;
  const Buffer<float> g(taps * kO);
  for (int64_t block = first_block; block < last_block; ++block) {
    const float* from[kO];
    first_weights(w.from, block, s.outputs, w.output_step, from);
    float* to = w.forms + block * winograd_block_elements(s);
    for (int64_t i = 0; i < s.inputs; ++i) {
      transpose_taps(from, taps, w.mirrored, g.get(), kO);
      for (int64_t column = 0; column < columns; ++column, to += kO)
        write_forms(g.get() + column * kO, columns * kO, to, s.inputs * columns * kO);
      for (int64_t o = 0; o < kO; ++o) from[o] += w.input_step;
    }
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
