// SPDX-License-Identifier: Apache-2.0
//
// One block of outputs × inputs: its sums over rows of points, and their squares or sums over examples.
#pragma once

#include "conv3d/cpu/conv_square_rows.h"
#include "conv3d/cpu/weight_block.h"
#include "math/shuffle.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

constexpr int64_t kStretch = 1 << 17;  // elements of the forms of grad and input

TIMM_EXT_FN int64_t stretch_rows(const ConvSquareProblem& p) {
  const int64_t point = p.layout->values + p.layout->inputs * p.layout->halves;
  const int64_t row = p.layout->forms() * p.shape->out[2] * point;
  return p.layout->pairs ? larger_of(kStretch / row, 1) : p.rows;
}

TIMM_EXT_FN int64_t smallest(int64_t a, int64_t b, int64_t c) {
  const int64_t ab = a < b ? a : b;
  return ab < c ? ab : c;
}

template <class B>
class Block {
 public:
  Block(const ConvSquareProblem& p, int64_t first_value, int64_t first_input)
      : p_(p),
        first_value_(first_value),
        first_input_(first_input),
        grad_(p.grad + first_value / kUnitValues * p.layout->grad_block(*p.shape) + first_value % kUnitValues),
        input_(p.input + first_input / kUnitInputs * p.layout->input_block() +
               first_input % kUnitInputs * p.layout->halves) {}

  /// sums[taps, inputs, vectors] += Σ grad · input over packed rows of an example.
  void add_taps(int64_t example, int64_t first_row, int64_t last_row, int64_t first_tap, int64_t last_tap,
                V* sums) const {
    const int64_t stretch = stretch_rows(p_), group = p_.layout->group;
    for (int64_t row = first_row, last = 0; row < last_row; row = last) {
      const int64_t group_end = row / group * group + group;
      last = smallest(row + stretch, group_end, last_row);
      for (int64_t tap = first_tap; tap < last_tap; tap += B::kTaps) {
        add_products(example, p_.taps[tap], row, last, sums + (tap - first_tap) * B::kSums);
      }
    }
  }

  /// Brings the sums of all forms to those of the kernel's planes and rows, [4, 4, columns], the last of each 0.
  void combine(V* sums) const {
    const int64_t row = p_.shape->kernel[2] * B::kSums;
    for (int64_t d = 0; d < kForms; ++d) combine_four(sums + d * kForms * row, row);
    combine_four(sums, kForms * row);
  }

  /// totals[planes, rows, columns] += sums² or sums, sums = 0.
  void take(V* sums, int64_t planes, V* totals) const {
    p_.squared ? take_as<true>(sums, planes, totals) : take_as<false>(sums, planes, totals);
  }

  /// Adds the totals at a plane of the kernel, [taps, inputs, vectors · lanes], to the accumulator.
  void write(const V* totals, int64_t plane) const {
    const ConvShape& s = *p_.shape;
    const int64_t taps = s.kernel[1] * s.kernel[2];
    constexpr int64_t halves = B::kHalves ? 2 : 1;
    const int64_t inputs = first_input_ + B::kInputs < s.inputs ? B::kInputs : s.inputs - first_input_;
    for (int64_t lane = 0; lane < B::kVectors * kLanes; lane += 4) {
      const int64_t output = (first_value_ + lane) / halves;
      const int64_t outputs = output + 4 / halves < s.outputs ? 4 / halves : s.outputs - output;
      float* const to = p_.accumulator + output * p_.output_step + first_input_ * p_.input_step + plane * taps;
      for (int64_t i = 0; i < inputs; ++i) {
        const float* const from = reinterpret_cast<const float*>(totals + i * B::kVectors) + lane;
        for (int64_t tap = 0; tap < taps; tap += 4) {
          const int64_t count = tap + 4 < taps ? 4 : taps - tap;
          math::FloatQuad four[4] = {};
          for (int64_t k = 0; k < count; ++k) {
            four[k] = math::load<math::FloatQuad>(from + (tap + k) * B::kSums * kLanes);
          }
          math::transpose(four);
          for (int64_t k = 0; k < outputs; ++k) {
            add_scaled(four[k * halves], p_.scale, count, to + k * p_.output_step + i * p_.input_step + tap);
          }
        }
      }
    }
  }

 private:
  template <bool Squared>
  void take_as(V* sums, int64_t planes, V* totals) const {
    const int64_t rows = p_.shape->kernel[1], columns = p_.shape->kernel[2];
    for (int64_t d = 0; d < planes; ++d) {
      for (int64_t k = 0; k < rows * columns * B::kSums; ++k, ++totals) {
        V& from = sums[d * p_.layout->row_taps * columns * B::kSums + k];
        const V sum = B::kHalves ? math::pair_sums(from) : from;
        if constexpr (Squared) {
          *totals += sum * sum;
        } else {
          *totals += sum;
        }
        from = V{};
      }
    }
  }

  /// to[taps, inputs, vectors] += Σ grad · input over rows, from a tap on.
  void add_products(int64_t example, const ConvTap& tap, int64_t first_row, int64_t last_row, V* to) const {
    const ConvShape& s = *p_.shape;
    const ConvLayout& layout = *p_.layout;
    const RowPoints points = points_at(tap);
    const int64_t grad_row = layout.grad_row(s), input_row = layout.input_row();
    const float* const grad = grad_ + example * layout.grad_elements(s) + tap.grad;
    const float* const input = input_ + example * layout.input_elements() + tap.input;
    int64_t d = first_row / layout.rows, h = first_row % layout.rows - 1;
    typename B::Sums sums = {};
    for (int64_t row = first_row; row < last_row; ++row) {
      const float* x = input + row * input_row;
      if (!layout.pairs) {
        if (++h == layout.rows) ++d, h = 0;
        if (h < tap.first[1] || h >= tap.last[1] || d < tap.first[0] || d >= tap.last[0]) continue;
        x = input + (d * s.stride[0] * layout.size[1] + h * s.stride[1]) * input_row;
      }
      if constexpr (B::kTaps == 3) {
        add_row_of_three<B>(grad + row * grad_row, x, points, sums);
      } else {
        add_row_of_one<B>(grad + row * grad_row, x, points, sums);
      }
    }
    for (int k = 0; k < B::kTaps; ++k) {
      for (int i = 0; i < B::kInputs; ++i) {
        for (int v = 0; v < B::kVectors; ++v, ++to) *to += sums[k][i][v];
      }
    }
  }

  RowPoints points_at(const ConvTap& tap) const {
    const ConvShape& s = *p_.shape;
    const int64_t grad_step = p_.layout->grad_point(), input_step = s.stride[2] * p_.layout->input_point();
    if (B::kTaps == 1) return {s.out[2], tap.first[2], tap.last[2], grad_step, input_step};
    const int64_t size = p_.layout->size[2], last = s.padding[2] + s.in[2];
    return {s.out[2], s.padding[2] < size ? s.padding[2] : size, last < size ? last : size, grad_step, input_step};
  }

  /// Of four groups of sums, `next` apart, makes three, and 0.
  static void combine_four(V* sums, int64_t next) {
    for (int64_t k = 0; k < next; ++k, ++sums) {
      const V half_sum = 0.5f * (sums[next] + sums[2 * next]), half_difference = 0.5f * (sums[next] - sums[2 * next]);
      sums[0] += half_sum;
      sums[next] = half_difference;
      sums[2 * next] = half_sum + sums[3 * next];
      sums[3 * next] = V{};
    }
  }

  const ConvSquareProblem& p_;
  int64_t first_value_;
  int64_t first_input_;
  const float* grad_;
  const float* input_;
};

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
