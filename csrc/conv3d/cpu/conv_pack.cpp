// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>

#include "conv3d/cpu/conv_square.h"
#include "math/half.h"
#include "math/shuffle.h"
#include "math/simd.h"

namespace timm_ext::cpu {
namespace {

using math::FloatQuad;

/// The elements [first, last) of a row of `count` whose positions, element + start, lie in [0, length).
void inside(int64_t length, int64_t start, int64_t count, int64_t& first, int64_t& last) {
  first = std::clamp<int64_t>(-start, 0, count);
  last = std::clamp<int64_t>(length - start, first, count);
}

/// The first point at or after `position` of an axis of the input, among `count` of grad.
int64_t first_point(int64_t position, int64_t stride, int64_t count) {
  return std::min(round_up(std::max<int64_t>(position, 0), stride) / stride, count);
}

float value_of(float x) { return x; }
float value_of(math::BFloat16 x) { return math::to_float(x); }

FloatQuad load_quad(const float* from) { return math::load<FloatQuad>(from); }
FloatQuad load_quad(const math::BFloat16* from) {
  typedef uint16_t Halves __attribute__((vector_size(8)));
  typedef uint32_t Bits __attribute__((vector_size(16)));
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return (FloatQuad)(__builtin_convertvector(halves, Bits) << 16);
}

/// What the lanes of a row's points are read from: four channels at a time, since channels often lie a multiple of a
/// cache's size apart, where it holds eight lines at most.
template <class S>
struct Lanes {
  const S* from[kUnitValues];

  /// to[point, lane] = from[lane][point].
  void transpose(int64_t lanes, int64_t points, float* to) const {
    for (int64_t lane = 0; lane < lanes; lane += 4) {
      int64_t q = 0;
      for (; q + 4 <= points; q += 4) {
        FloatQuad four[4];
        for (int k = 0; k < 4; ++k) four[k] = load_quad(from[lane + k] + q);
        math::transpose(four);
        for (int k = 0; k < 4; ++k) math::store(to + (q + k) * lanes + lane, four[k]);
      }
      for (; q < points; ++q) {
        for (int k = 0; k < 4; ++k) to[q * lanes + lane + k] = value_of(from[lane + k][q]);
      }
    }
  }
};

/// The channels of a block of one example: [channels, planes, rows, columns].
template <class S>
class Channels {
 public:
  Channels(const S* first, int64_t channels, const int64_t (&size)[3], int64_t halves, int64_t half_planes)
      : first_(first),
        channels_(channels),
        size_(size),
        halves_(halves),
        half_planes_(half_planes),
        zeros_(static_cast<size_t>(size[2])) {}

  /// The columns [begin, end) of a row of all halves, as to[column, lanes]; zeros outside.
  void read(int64_t plane, int64_t row, int64_t begin, int64_t end, int64_t lanes, float* to) const {
    Lanes<S> from;
    for (int64_t half = 0; half < halves_; ++half) {
      const int64_t d = plane + half * half_planes_;
      const bool there = d >= 0 && d < size_[0] && row >= 0 && row < size_[1];
      const S* channel = first_ + (d * size_[1] + row) * size_[2] + begin;
      for (int64_t lane = half; lane < lanes; lane += halves_, channel += size_[0] * size_[1] * size_[2]) {
        from.from[lane] = there && lane < channels_ * halves_ ? channel : zeros_.data();
      }
    }
    from.transpose(lanes, end - begin, to);
  }

 private:
  const S* first_;
  int64_t channels_;
  const int64_t (&size_)[3];
  int64_t halves_;
  int64_t half_planes_;  // from a half to the other
  std::vector<S> zeros_;
};

/// Whether taking planes and rows in pairs is possible, and pays: of few, packing takes what it saves.
bool takes_pairs(const ConvShape& s) {
  constexpr int64_t least = 6;
  for (int a = 0; a < 2; ++a) {
    if (s.kernel[a] != 3 || s.stride[a] != 1 || s.dilation[a] != 1 || s.out[a] < least) return false;
  }
  return true;
}

constexpr int64_t kGroup = 1 << 18;      // elements of the forms of grad and input: they stay in a core's cache
constexpr int64_t kGroupsPerThread = 4;  // of several threads, so that they seldom wait for one another

}  // namespace

ConvLayout::ConvLayout(const ConvShape& s, int64_t threads, bool mirrored)
    : pairs(takes_pairs(s)),
      halves(2 * s.outputs <= kPointLanes && s.out[0] > 1 ? 2 : 1),
      planes(((pairs ? (s.out[0] + 1) / 2 : s.out[0]) + halves - 1) / halves),
      rows(pairs ? (s.out[1] + 1) / 2 : s.out[1]),
      plane_taps(pairs ? kForms : s.kernel[0]),
      row_taps(pairs ? kForms : s.kernel[1]),
      values(round_up(s.outputs * halves, kPointLanes)),
      inputs(round_up(s.inputs, kPointInputs)),
      group(planes * rows),
      slab(group) {
  const int64_t out[3] = {planes, s.out[1], s.out[2]};
  for (int a = 0; a < 3; ++a) size[a] = (out[a] - 1) * s.stride[a] + (s.kernel[a] - 1) * s.dilation[a] + 1;
  if (pairs) {
    size[0] = planes, size[1] = rows;
    const int64_t row = forms() * (s.out[2] * values + size[2] * inputs * halves);
    group = std::clamp<int64_t>(kGroup / row, 1, group);
    slab = std::min(slab, threads > 1 ? kGroupsPerThread * threads * group : group);
  }
  for (int64_t d = 0; d < plane_taps; ++d) {
    for (int64_t h = 0; h < row_taps; ++h) {
      for (int64_t w = 0; w < s.kernel[2]; ++w) taps.push_back(tap_at(s, {d, h, w}));
    }
  }
  if (mirrored) std::reverse(taps.begin(), taps.end());
}

ConvTap ConvLayout::tap_at(const ConvShape& s, const std::array<int64_t, 3>& at) const {
  ConvTap tap{0, 0, {}, {}};
  for (int a = 0; a < 3; ++a) {
    const bool all = (a == 0 && halves == 2) || (a < 2 && pairs);
    const int64_t count = a == 0 ? planes : a == 1 ? rows : s.out[2];
    const int64_t shift = at[a] * s.dilation[a];
    tap.first[a] = all ? 0 : first_point(s.padding[a] - shift, s.stride[a], count);
    tap.last[a] = all ? count : first_point(s.in[a] + s.padding[a] - shift, s.stride[a], count);
  }
  tap.input = at[2] * s.dilation[2] * input_point();
  if (pairs) {
    const int64_t form = at[0] * kForms + at[1];
    tap.grad = form * grad_form(s), tap.input += form * input_form();
  } else {
    tap.input += (at[0] * s.dilation[0] * size[1] + at[1] * s.dilation[1]) * input_row();
  }
  return tap;
}

template <class S>
void pack_grad(const ConvShape& s, const ConvLayout& layout, WriteForms write_forms, const S* grad, float* packed,
               int64_t slab, int64_t first_row, int64_t last_row) {
  const int64_t channel = s.out[0] * s.out[1] * s.out[2], point = layout.grad_point();
  const int64_t channels = point / layout.halves, row = layout.grad_row(s);
  std::vector<float> memory(layout.pairs ? 4 * row : 0);
  const float* rows[4];
  for (int64_t k = 0; k < 4; ++k) rows[k] = memory.data() + k * row;
  for (int64_t block = 0; block < layout.grad_blocks(); ++block) {
    const Channels<S> from(grad + block * channels * channel, std::min(channels, s.outputs - block * channels), s.out,
                           layout.halves, layout.planes * (layout.pairs ? 2 : 1));
    float* to = packed + block * layout.grad_block(s) + (first_row - slab) * row;
    for (int64_t r = first_row; r < last_row; ++r, to += row) {
      const int64_t d = r / layout.rows, h = r % layout.rows;
      if (!layout.pairs) {
        from.read(d, h, 0, s.out[2], point, to);
        continue;
      }
      for (int64_t k = 0; k < 4; ++k) {
        from.read(2 * d + k / 2, 2 * h + k % 2, 0, s.out[2], point, memory.data() + k * row);
      }
      write_forms(rows, row, to, layout.grad_form(s));
    }
  }
}

template <class S>
void pack_input(const ConvShape& s, const ConvLayout& layout, WriteForms write_forms, const S* input, float* packed,
                int64_t slab, int64_t first_row, int64_t last_row) {
  const int64_t channel = s.in[0] * s.in[1] * s.in[2], point = layout.input_point();
  const int64_t channels = point / layout.halves, row = layout.input_row();
  int64_t first = 0, last = 0;
  inside(s.in[2], -s.padding[2], layout.size[2], first, last);
  std::vector<float> memory(layout.pairs ? kForms * kForms * row : 0);
  for (int64_t block = 0; block < layout.input_blocks(); ++block) {
    const Channels<S> from(input + block * channels * channel, std::min(channels, s.inputs - block * channels), s.in,
                           layout.halves, layout.planes * (layout.pairs ? 2 : s.stride[0]));
    const auto read = [&](int64_t d, int64_t h, float* to) {
      std::fill(to, to + first * point, 0.0f);
      from.read(d - s.padding[0], h - s.padding[1], first - s.padding[2], last - s.padding[2], point,
                to + first * point);
      std::fill(to + last * point, to + row, 0.0f);
    };
    float* to = packed + block * layout.input_block() + (first_row - slab) * row;
    for (int64_t r = first_row; r < last_row; ++r, to += row) {
      const int64_t d = r / layout.size[1], h = r % layout.size[1];
      if (!layout.pairs) {
        read(d, h, to);
        continue;
      }
      const float* rows[kForms * kForms];
      for (int64_t k = 0; k < kForms * kForms; ++k) {
        const int64_t plane = k / kForms, at = k % kForms;
        float* const place = memory.data() + (plane * kForms + (2 * h + at) % kForms) * row;
        const bool known = at < 2 && h > 0 && r > first_row;  // from the pair before
        if (!known) read(2 * d + plane, 2 * h + at, place);
        rows[k] = place;
      }
      write_forms(rows, row, to, layout.input_form());
    }
  }
}

template void pack_grad(const ConvShape&, const ConvLayout&, WriteForms, const float*, float*, int64_t, int64_t,
                        int64_t);
template void pack_grad(const ConvShape&, const ConvLayout&, WriteForms, const math::BFloat16*, float*, int64_t,
                        int64_t, int64_t);
template void pack_input(const ConvShape&, const ConvLayout&, WriteForms, const float*, float*, int64_t, int64_t,
                         int64_t);
template void pack_input(const ConvShape&, const ConvLayout&, WriteForms, const math::BFloat16*, float*, int64_t,
                         int64_t, int64_t);

int64_t conv_sums_elements(const ConvLayout& layout, const ConvShape& s) {
  return layout.plane_taps * layout.row_taps * s.kernel[2] * layout.values * layout.inputs;
}

int64_t conv_square_units(const ConvSquareProblem& p) {
  return p.layout->grad_blocks() * p.layout->input_blocks() * (p.layout->pairs ? 1 : p.shape->kernel[0]);
}

int64_t conv_square_add_units(const ConvSquareProblem& p) {
  return p.layout->grad_blocks() * p.layout->input_blocks() * p.layout->plane_taps;
}

}  // namespace timm_ext::cpu
