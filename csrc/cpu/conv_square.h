// SPDX-License-Identifier: Apache-2.0
//
// Weight gradients of single examples of a convolution, squared: the form in which the kernels read grad and input.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "../math/conv_shape.h"
#include "../math/portable.h"

namespace timm_ext::cpu {

using math::ConvShape;

TIMM_EXT_FN constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

constexpr int64_t kPointLanes = 16;  // values of grad at a point are padded to a multiple
constexpr int64_t kPointInputs = 4;  // channels of the input likewise

/// A place of the kernel, or of a form.
struct ConvTap {
  int64_t grad;      // where its factors begin in the packed form of an example
  int64_t input;     // likewise
  int64_t first[3];  // of the points of grad for which the inputs are not padding; of two halves, all planes
  int64_t last[3];   // one beyond
};

constexpr int64_t kUnitValues = 32;  // values of grad at a point in a unit of work
constexpr int64_t kUnitInputs = 8;
constexpr int64_t kForms = 4;
constexpr int64_t kFormGap = 80;  // elements between forms, which are written side by side: no multiple of a page apart

/// Where things lie in the packed form: blocks of the channels that a unit of work reads, in a block channels last, the
/// input zero-padded. With few outputs, the planes of grad are taken in two halves, whose values alternate, so that a
/// vector holds both.
///
/// A kernel of three rows meets the rows of grad in pairs (Winograd's F(2, 3), turned round): of g0, g1 and the input's
/// rows x0 … x3 there are four forms, whose products m0 … m3, summed over all pairs, give the gradients at the three
/// rows: four multiplications in place of six.
///     m0 = g0 (x0 − x2)    m1 = (g0 + g1) (x1 + x2)    m2 = (g0 − g1) (x2 − x1)    m3 = g1 (x3 − x1)
///     m0 + (m1 + m2) / 2,  (m1 − m2) / 2,  (m1 + m2) / 2 + m3
struct ConvLayout {
  explicit ConvLayout(const ConvShape& shape);

  bool pairs;                 // of rows
  int64_t halves;             // 1 or 2
  int64_t planes;             // of a half of grad
  int64_t rows;               // of a plane of grad, or pairs of them
  int64_t row_taps;           // rows of the kernel, or forms
  int64_t values;             // of grad at a point
  int64_t inputs;             // channels, padded
  int64_t size[3];            // of the zero-padded input that belongs to a half; pairs in place of rows
  std::vector<ConvTap> taps;  // [planes of the kernel, row_taps, columns of the kernel]

  /// Elements of a point in a block.
  TIMM_EXT_FN int64_t grad_point() const { return values < kUnitValues ? values : kUnitValues; }
  TIMM_EXT_FN int64_t input_point() const { return (inputs < kUnitInputs ? inputs : kUnitInputs) * halves; }

  TIMM_EXT_FN int64_t grad_blocks() const { return round_up(values, kUnitValues) / kUnitValues; }
  TIMM_EXT_FN int64_t input_blocks() const { return round_up(inputs, kUnitInputs) / kUnitInputs; }

  TIMM_EXT_FN int64_t grad_rows() const { return planes * rows; }
  TIMM_EXT_FN int64_t input_rows() const { return size[0] * size[1]; }

  TIMM_EXT_FN int64_t grad_row(const ConvShape& s) const { return s.out[2] * grad_point(); }
  TIMM_EXT_FN int64_t input_row() const { return size[2] * input_point(); }

  /// Elements from a form of a block to the next.
  TIMM_EXT_FN int64_t grad_form(const ConvShape& s) const { return grad_rows() * grad_row(s) + kFormGap; }
  TIMM_EXT_FN int64_t input_form() const { return input_rows() * input_row() + kFormGap; }

  TIMM_EXT_FN int64_t forms() const { return pairs ? kForms : 1; }
  TIMM_EXT_FN int64_t grad_block(const ConvShape& s) const { return forms() * grad_form(s); }
  TIMM_EXT_FN int64_t input_block() const { return forms() * input_form(); }

  TIMM_EXT_FN int64_t grad_elements(const ConvShape& s) const { return grad_blocks() * grad_block(s); }
  TIMM_EXT_FN int64_t input_elements() const { return input_blocks() * input_block(); }

 private:
  ConvTap tap_at(const ConvShape& shape, const std::array<int64_t, 3>& at) const;
};

/// Packs rows, or pairs, of one example.
void pack_grad(const ConvShape&, const ConvLayout&, const float* grad, float* packed, int64_t first_row,
               int64_t last_row);
void pack_input(const ConvShape&, const ConvLayout&, const float* input, float* packed, int64_t first_row,
                int64_t last_row);

/// accumulator[o, i, tap] += scale Σ_b (Σ_points grad · input)².
struct ConvSquareProblem {
  const ConvShape* shape;
  const ConvLayout* layout;  // the kernels leave its vector alone: see buffer.h
  const ConvTap* taps;
  const float* grad;   // [examples, layout.grad_elements]
  const float* input;  // [examples, layout.input_elements]
  int64_t examples;
  float* accumulator;  // [outputs, inputs, taps]
  float scale;
};

/// Units of work: blocks of outputs × blocks of inputs × planes of the kernel. Each adds to elements of its own.
int64_t conv_square_units(const ConvSquareProblem&);

}  // namespace timm_ext::cpu
