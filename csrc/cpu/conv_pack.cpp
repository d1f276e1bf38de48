// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "conv_square.h"

namespace timm_ext::cpu {
namespace {

/// The elements [first, last) of a row of `count` whose positions, element + start, lie in [0, length).
void inside(int64_t length, int64_t start, int64_t count, int64_t& first, int64_t& last) {
  first = std::clamp<int64_t>(-start, 0, count);
  last = std::clamp<int64_t>(length - start, first, count);
}

/// Brings a row of all channels to channels last, every `apart` values: to[q, c · apart] = from[c, q].
void interleave(const float* from, int64_t channels, int64_t channel_stride, int64_t count, float* to, int64_t row,
                int64_t apart) {
  constexpr int64_t block = 16;  // points whose lines stay in the cache
  for (int64_t first = 0; first < count; first += block) {
    const int64_t last = std::min(count, first + block);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t q = first; q < last; ++q) to[q * row + c * apart] = from[c * channel_stride + q];
    }
  }
}

}  // namespace

ConvLayout::ConvLayout(const ConvShape& s)
    : halves(2 * s.outputs <= kPointLanes && s.out[0] > 1 ? 2 : 1),
      planes((s.out[0] + halves - 1) / halves),
      values(round_up(s.outputs * halves, kPointLanes)),
      inputs(round_up(s.inputs, kPointInputs)) {
  const int64_t out[3] = {planes, s.out[1], s.out[2]};
  for (int a = 0; a < 3; ++a) size[a] = (out[a] - 1) * s.stride[a] + (s.kernel[a] - 1) * s.dilation[a] + 1;
  for (int64_t d = 0; d < s.kernel[0]; ++d) {
    for (int64_t h = 0; h < s.kernel[1]; ++h) {
      for (int64_t w = 0; w < s.kernel[2]; ++w) {
        const int64_t row = d * s.dilation[0] * size[1] + h * s.dilation[1];
        taps.push_back((row * size[2] + w * s.dilation[2]) * inputs * halves);
      }
    }
  }
}

void pack_grad(const ConvShape& s, const ConvLayout& layout, const float* grad, float* packed, int64_t first_row,
               int64_t last_row) {
  const int64_t channel = s.out[0] * s.out[1] * s.out[2];
  const int64_t row_elements = s.out[2] * layout.values;
  std::fill(packed + first_row * row_elements, packed + last_row * row_elements, 0.0f);
  for (int64_t row = first_row; row < last_row; ++row) {
    for (int64_t half = 0; half < layout.halves; ++half) {
      const int64_t plane = half * layout.planes + row / s.out[1];
      if (plane >= s.out[0]) continue;
      const float* const from = grad + (plane * s.out[1] + row % s.out[1]) * s.out[2];
      float* const to = packed + row * row_elements + half;
      interleave(from, s.outputs, channel, s.out[2], to, layout.values, layout.halves);
    }
  }
}

void pack_input(const ConvShape& s, const ConvLayout& layout, const float* input, float* packed, int64_t first_row,
                int64_t last_row) {
  const int64_t channel = s.in[0] * s.in[1] * s.in[2];
  const int64_t point = layout.inputs * layout.halves;
  const int64_t row_elements = layout.size[2] * point;
  std::fill(packed + first_row * row_elements, packed + last_row * row_elements, 0.0f);
  int64_t first = 0, last = 0;
  inside(s.in[2], -s.padding[2], layout.size[2], first, last);
  for (int64_t row = first_row; row < last_row; ++row) {
    for (int64_t half = 0; half < layout.halves; ++half) {
      const int64_t d = half * layout.planes * s.stride[0] + row / layout.size[1] - s.padding[0];
      const int64_t h = row % layout.size[1] - s.padding[1];
      if (d < 0 || d >= s.in[0] || h < 0 || h >= s.in[1]) continue;
      const float* const from = input + (d * s.in[1] + h) * s.in[2] + first - s.padding[2];
      float* const to = packed + row * row_elements + first * point + half;
      interleave(from, s.inputs, channel, last - first, to, point, layout.halves);
    }
  }
}

int64_t conv_square_units(const ConvSquareProblem& p) {
  return round_up(p.layout->values, kUnitValues) / kUnitValues *
         (round_up(p.shape->inputs, kUnitInputs) / kUnitInputs) * p.shape->kernel[0];
}

}  // namespace timm_ext::cpu
