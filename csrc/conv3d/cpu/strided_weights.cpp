// SPDX-License-Identifier: Apache-2.0
#include "conv3d/cpu/kernels.h"
#include "conv3d/cpu/transpose_taps.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

static_assert(kStridedOutputs == kTapOutputs);

void strided_weights(const StridedWeights& w, int64_t first_block, int64_t last_block) {
  const int64_t step = w.taps_outside ? strided_tap_step(w.inputs) : kTapOutputs;
  const int64_t next = w.taps_outside ? kTapOutputs : kStridedTaps * kTapOutputs;
  for (int64_t block = first_block; block < last_block; ++block) {
    const float* from[kTapOutputs];
    first_weights(w.from, block, w.outputs, w.output_step, from);
    float* to = w.to + block * strided_block_elements(w.inputs);
    for (int64_t i = 0; i < w.inputs; ++i, to += next) {
      transpose_taps(from, kStridedTaps, w.mirrored, to, step);
      for (int64_t o = 0; o < kTapOutputs; ++o) from[o] += w.input_step;
    }
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
