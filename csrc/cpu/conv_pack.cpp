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

/// The first point at or after `position` of an axis of the input, within the axis of grad.
int64_t first_point(int64_t position, const ConvShape& s, int axis) {
  const int64_t stride = s.stride[axis];
  return std::min(round_up(std::max<int64_t>(position, 0), stride) / stride, s.out[axis]);
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
      for (int64_t w = 0; w < s.kernel[2]; ++w) taps.push_back(tap_at(s, {d, h, w}));
    }
  }
}

ConvTap ConvLayout::tap_at(const ConvShape& s, const std::array<int64_t, 3>& at) const {
  ConvTap tap{0, {}, {}};
  for (int a = 0; a < 3; ++a) {
    const int64_t shift = at[a] * s.dilation[a];
    tap.offset = tap.offset * size[a] + shift;
    tap.first[a] = first_point(s.padding[a] - shift, s, a);
    tap.last[a] = first_point(s.in[a] + s.padding[a] - shift, s, a);
  }
  tap.offset *= input_point();
  if (halves == 2) tap.first[0] = 0, tap.last[0] = planes;
  return tap;
}

void pack_grad(const ConvShape& s, const ConvLayout& layout, const float* grad, float* packed, int64_t first_row,
               int64_t last_row) {
  const int64_t channel = s.out[0] * s.out[1] * s.out[2], point = layout.grad_point();
  const int64_t channels = point / layout.halves;
  for (int64_t block = 0; block < layout.grad_blocks(); ++block) {
    float* const rows = packed + block * layout.grad_block(s);
    const float* const first = grad + block * channels * channel;
    const int64_t count = std::min(channels, s.outputs - block * channels);
    std::fill(rows + first_row * s.out[2] * point, rows + last_row * s.out[2] * point, 0.0f);
    for (int64_t row = first_row; row < last_row; ++row) {
      for (int64_t half = 0; half < layout.halves; ++half) {
        const int64_t plane = half * layout.planes + row / s.out[1];
        if (plane >= s.out[0]) continue;
        const float* const from = first + (plane * s.out[1] + row % s.out[1]) * s.out[2];
        interleave(from, count, channel, s.out[2], rows + row * s.out[2] * point + half, point, layout.halves);
      }
    }
  }
}

void pack_input(const ConvShape& s, const ConvLayout& layout, const float* input, float* packed, int64_t first_row,
                int64_t last_row) {
  const int64_t channel = s.in[0] * s.in[1] * s.in[2], point = layout.input_point();
  const int64_t channels = point / layout.halves, row_elements = layout.size[2] * point;
  int64_t first = 0, last = 0;
  inside(s.in[2], -s.padding[2], layout.size[2], first, last);
  for (int64_t block = 0; block < layout.input_blocks(); ++block) {
    float* const rows = packed + block * layout.input_block();
    const float* const begin = input + block * channels * channel + first - s.padding[2];
    const int64_t count = std::min(channels, s.inputs - block * channels);
    std::fill(rows + first_row * row_elements, rows + last_row * row_elements, 0.0f);
    for (int64_t row = first_row; row < last_row; ++row) {
      for (int64_t half = 0; half < layout.halves; ++half) {
        const int64_t d = half * layout.planes * s.stride[0] + row / layout.size[1] - s.padding[0];
        const int64_t h = row % layout.size[1] - s.padding[1];
        if (d < 0 || d >= s.in[0] || h < 0 || h >= s.in[1]) continue;
        const float* const from = begin + (d * s.in[1] + h) * s.in[2];
        interleave(from, count, channel, last - first, rows + row * row_elements + first * point + half, point,
                   layout.halves);
      }
    }
  }
}

int64_t conv_square_units(const ConvSquareProblem& p) {
  return p.layout->grad_blocks() * p.layout->input_blocks() * p.shape->kernel[0];
}

}  // namespace timm_ext::cpu
