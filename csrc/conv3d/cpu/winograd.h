// SPDX-License-Identifier: Apache-2.0
//
// A convolution of stride 1 by Winograd's F(2 × 2, 3 × 3) over planes and rows (Lavin and Gray, CVPR 2016): 16
// multiplications in place of 36 for each column of the kernel. Of two outputs y0, y1 of an axis, inputs x0 … x3 and
// kernel g0 … g2:
//     m0 = g0 (x0 − x2)    m1 = (g0 + g1 + g2) / 2 (x1 + x2)    m2 = (g0 − g1 + g2) / 2 (x2 − x1)    m3 = g2 (x1 − x3)
//     y0 = m0 + m1 + m2    y1 = m1 − m2 − m3
// and of two axes likewise, one after the other.
#pragma once

#include <cstdint>

#include "conv3d/problem.h"
#include "math/portable.h"

namespace timm_ext::cpu {

constexpr int64_t kWinogradForms = 16;
constexpr int64_t kWinogradOutputs = 8;  // channels of the output that are computed together
constexpr int64_t kWinogradRows = 8;     // of the output in a unit of work, a multiple of those in two vectors

struct WinogradProblem {
  const ConvShape* shape;  // kernel [3, 3, any], stride and dilation 1
  const float* input;      // [examples, inputs, in]
  const float* forms;      // of the weights, by winograd_weights
  const float* bias;       // [outputs], or null for none
  float* output;           // [examples, outputs, out]
  int64_t examples;
};

TIMM_EXT_FN int64_t winograd_blocks(const ConvShape& s) {
  return (s.outputs + kWinogradOutputs - 1) / kWinogradOutputs;
}

/// Elements of the weights' forms [blocks of outputs, 16, inputs, columns of the kernel, outputs of a block].
TIMM_EXT_FN int64_t winograd_block_elements(const ConvShape& s) {
  return kWinogradForms * s.inputs * s.kernel[2] * kWinogradOutputs;
}

/// Weights [outputs, inputs, 3, 3, columns] at these steps; mirrored: the last tap first.
struct WinogradWeights {
  const ConvShape* shape;
  const float* from;
  int64_t output_step;
  int64_t input_step;
  bool mirrored;
  float* forms;
};

/// Units of work: two planes × kWinogradRows rows of the output of one example.
TIMM_EXT_FN int64_t winograd_row_groups(const ConvShape& s) { return (s.out[1] + kWinogradRows - 1) / kWinogradRows; }
TIMM_EXT_FN int64_t winograd_units(const WinogradProblem& p) {
  return p.examples * ((p.shape->out[0] + 1) / 2) * winograd_row_groups(*p.shape);
}

}  // namespace timm_ext::cpu
