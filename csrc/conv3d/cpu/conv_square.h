// SPDX-License-Identifier: Apache-2.0
//
// Weight gradients of single examples of a convolution, squared: the form in which the kernels read grad and input.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "conv3d/problem.h"
#include "math/portable.h"

namespace timm_ext::cpu {

TIMM_EXT_FN constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

constexpr int64_t kPointLanes = 16;  // values of grad at a point are padded to a multiple
constexpr int64_t kPointInputs = 4;  // channels of the input likewise

constexpr int64_t kUnitValues = 32;  // values of grad at a point in a unit of work
constexpr int64_t kUnitInputs = 8;
constexpr int64_t kForms = 4;     // of an axis
constexpr int64_t kFormGap = 80;  // elements between forms, which are written side by side: no multiple of a page apart

/// A place of the kernel, or of a form.
struct ConvTap {
  int64_t grad;      // where its factors begin in the packed form of an example
  int64_t input;     // likewise
  int64_t first[3];  // of the points of grad for which the inputs are not padding; of two halves, all planes
  int64_t last[3];   // one beyond
};

/// Where things lie in the packed form: blocks of the channels that a unit of work reads, in a block channels last, the
/// input zero-padded. With few outputs, the planes of grad are taken in two halves, whose values alternate, so that a
/// vector holds both.
///
/// A kernel of three planes and three rows meets those of grad in pairs (Winograd's F(2, 3), turned round, on both
/// axes). On one axis, of g0, g1 and the input's x0 … x3 there are four forms, whose products m0 … m3, summed over all
/// pairs, give the gradients at the three places of the kernel: four multiplications in place of six.
///     m0 = g0 (x0 − x2)    m1 = (g0 + g1) (x1 + x2)    m2 = (g0 − g1) (x2 − x1)    m3 = −g1 (x1 − x3)
///     m0 + (m1 + m2) / 2,  (m1 − m2) / 2,  (m1 + m2) / 2 + m3
/// Forms take four times the memory, so that an example goes through in slabs.
struct ConvLayout {
  /// Mirrored: the last tap first; for strides that are not 1.
  ConvLayout(const ConvShape& shape, int64_t threads, bool mirrored);

  bool pairs;                 // of planes and rows
  int64_t halves;             // 1 or 2
  int64_t planes;             // of a half of grad, or pairs of them
  int64_t rows;               // of a plane of grad, or pairs of them
  int64_t plane_taps;         // planes of the kernel, or forms
  int64_t row_taps;           // rows of the kernel, or forms
  int64_t values;             // of grad at a point
  int64_t inputs;             // channels, padded
  int64_t size[3];            // of the zero-padded input that belongs to a half; pairs in place of planes and rows
  int64_t group;              // rows of grad, counted through its planes, that are summed together; else all
  int64_t slab;               // those packed at a time, some groups
  std::vector<ConvTap> taps;  // [plane_taps, row_taps, columns of the kernel]

  /// Elements of a point in a block.
  TIMM_EXT_FN int64_t grad_point() const { return values < kUnitValues ? values : kUnitValues; }
  TIMM_EXT_FN int64_t input_point() const { return (inputs < kUnitInputs ? inputs : kUnitInputs) * halves; }

  TIMM_EXT_FN int64_t grad_blocks() const { return round_up(values, kUnitValues) / kUnitValues; }
  TIMM_EXT_FN int64_t input_blocks() const { return round_up(inputs, kUnitInputs) / kUnitInputs; }

  TIMM_EXT_FN int64_t grad_rows() const { return planes * rows; }
  TIMM_EXT_FN int64_t input_rows() const { return size[0] * size[1]; }  // with pairs, those of grad

  TIMM_EXT_FN int64_t grad_row(const ConvShape& s) const { return s.out[2] * grad_point(); }
  TIMM_EXT_FN int64_t input_row() const { return size[2] * input_point(); }

  /// Elements from a form of a block to the next.
  TIMM_EXT_FN int64_t grad_form(const ConvShape& s) const { return slab * grad_row(s) + kFormGap; }
  TIMM_EXT_FN int64_t input_form() const { return (pairs ? slab : input_rows()) * input_row() + kFormGap; }

  TIMM_EXT_FN int64_t forms() const { return pairs ? kForms * kForms : 1; }
  TIMM_EXT_FN int64_t grad_block(const ConvShape& s) const { return forms() * grad_form(s); }
  TIMM_EXT_FN int64_t input_block() const { return forms() * input_form(); }

  TIMM_EXT_FN int64_t grad_elements(const ConvShape& s) const { return grad_blocks() * grad_block(s); }
  TIMM_EXT_FN int64_t input_elements() const { return input_blocks() * input_block(); }

 private:
  ConvTap tap_at(const ConvShape& shape, const std::array<int64_t, 3>& at) const;
};

/// Writes the forms of two by two rows of grad, or of four by four of the input, `form` elements apart.
using WriteForms = void (*)(const float* const* rows, int64_t row, float* to, int64_t form);

/// Packs rows [first_row, last_row) of one example, or pairs of them, of a slab that begins at row `slab`; stored as
/// S, float or bfloat16.
template <class S>
void pack_grad(const ConvShape&, const ConvLayout&, WriteForms, const S* grad, float* packed, int64_t slab,
               int64_t first_row, int64_t last_row);
template <class S>
void pack_input(const ConvShape&, const ConvLayout&, WriteForms, const S* input, float* packed, int64_t slab,
                int64_t first_row, int64_t last_row);

/// accumulator[o, i, tap] += scale Σ_b (Σ_points grad · input)², or += scale Σ_b Σ_points grad · input.
struct ConvSquareProblem {
  const ConvShape* shape;
  const ConvLayout* layout;  // the kernels leave its vector alone: see cpu/buffer.h
  const ConvTap* taps;
  const float* grad;   // [examples, layout.grad_elements]
  const float* input;  // [examples, layout.input_elements]
  int64_t examples;    // one, where it takes several slabs
  int64_t rows;        // of the slab
  float* sums;         // of one example, or of all, over slabs, [conv_sums_elements], aligned, 0 at first
  float* accumulator;
  int64_t output_step;  // of the accumulator, whose taps lie side by side
  int64_t input_step;
  float scale;
  bool squared = true;  // each example's gradient; else they are added up
};

/// Elements of the sums.
int64_t conv_sums_elements(const ConvLayout&, const ConvShape&);

/// Units of work: blocks of outputs × blocks of inputs, × planes of the kernel where those have sums of their own, or
/// plane forms for adding slabs. Each adds to elements of its own.
int64_t conv_square_units(const ConvSquareProblem&);
int64_t conv_square_add_units(const ConvSquareProblem&);

}  // namespace timm_ext::cpu
