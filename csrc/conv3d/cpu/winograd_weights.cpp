// SPDX-License-Identifier: Apache-2.0
#include <type_traits>

#include "conv3d/cpu/kernels.h"
#include "conv3d/cpu/transpose_taps.h"
#include "conv3d/cpu/winograd_axis.h"
#include "cpu/buffer.h"
#include "cpu/lanes.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int64_t kO = kWinogradOutputs;
static_assert(kO == kTapOutputs);

using Outputs = std::conditional_t<(kLanes > kO), math::HalfFloatV, V>;
constexpr int64_t kOutputs = sizeof(Outputs) / sizeof(float);
static_assert(kO % kOutputs == 0);

/// All forms, `form` elements apart, of the places g[0], g[step] … of a column of the kernels.
template <class Planes, class Rows>
TIMM_EXT_FN void write_forms(const float* g, int64_t step, float* to, int64_t form) {
  Outputs over_rows[Rows::kForms][Planes::kTaps];
  for (int64_t d = 0; d < Planes::kTaps; ++d) {
    Outputs row[Rows::kTaps], factors[Rows::kForms];
    for (int64_t h = 0; h < Rows::kTaps; ++h) row[h] = math::load<Outputs>(g + (Rows::kTaps * d + h) * step);
    Rows::weights(row, factors);
    for (int64_t h = 0; h < Rows::kForms; ++h) over_rows[h][d] = factors[h];
  }
  for (int64_t h = 0; h < Rows::kForms; ++h) {
    Outputs factors[Planes::kForms];
    Planes::weights(over_rows[h], factors);
    for (int64_t d = 0; d < Planes::kForms; ++d) math::store(to + (d * Rows::kForms + h) * form, factors[d]);
  }
}

template <class Planes, class Rows>
void write_blocks(const WinogradWeights& w, int64_t first_block, int64_t last_block) {
  const ConvShape& s = *w.shape;
  const int64_t columns = s.kernel[2], taps = s.kernel[0] * s.kernel[1] * columns;
  const Buffer<float> g(taps * kO);
  for (int64_t block = first_block; block < last_block; ++block) {
    const float* from[kO];
    first_weights(w.from, block, s.outputs, w.output_step, from);
    float* to = w.forms + block * winograd_block_elements(s);
    for (int64_t i = 0; i < s.inputs; ++i) {
      transpose_taps(from, taps, w.mirrored, g.get(), kO);
      for (int64_t column = 0; column < columns; ++column, to += kO) {
        for (int64_t o = 0; o < kO; o += kOutputs)
          write_forms<Planes, Rows>(g.get() + column * kO + o, columns * kO, to + o, winograd_weight_form(s));
      }
      for (int64_t o = 0; o < kO; ++o) from[o] += w.input_step;
    }
  }
}

}  // namespace

void winograd_weights(const WinogradWeights& w, int64_t first_block, int64_t last_block) {
  const WinogradTiling tiling(*w.shape);
  with_winograd_axes(w.shape->kernel[1], tiling.planes, tiling.rows, [&](auto* planes, auto* rows) {
    write_blocks<std::remove_pointer_t<decltype(planes)>, std::remove_pointer_t<decltype(rows)>>(w, first_block,
                                                                                                 last_block);
  });
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
