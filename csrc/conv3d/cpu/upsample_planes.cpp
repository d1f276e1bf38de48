// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "conv3d/cpu/kernels.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

void upsample_row(const float* from, int64_t columns, float* __restrict__ to) {
  for (int64_t w = 0; w < columns; ++w) to[2 * w] = to[2 * w + 1] = from[w];
}

}  // namespace

void upsample_planes(const UpsamplingProblem& p, int64_t first_plane, int64_t last_plane) {
  const int64_t row = 2 * p.columns, plane = 2 * p.rows * row;
  const size_t bytes = row * sizeof(float);
  for (int64_t d = first_plane; d < last_plane; ++d) {
    for (int64_t h = 0; h < p.rows; ++h) {
      float* const to = p.to + 2 * d * plane + 2 * h * row;
      upsample_row(p.from + (d * p.rows + h) * p.columns, p.columns, to);
      std::memcpy(to + row, to, bytes);
      std::memcpy(to + plane, to, 2 * bytes);
    }
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
