// SPDX-License-Identifier: Apache-2.0
//
// Convolutions with kernels of 3 × 3 × 3, zeros around, between volumes of which one has twice the sizes of the other.
//
// Back through a stride of 2, points are scattered: x[2 j + k − 1] += w[k] y[j].
//
// Nearest-neighbour upsampling by two is zeros put in between, and then the sum of each point and the one before it.
// Behind it, that sum may as well be taken of a convolution's output: 27 multiplications in place of 216 for each point
// of x,
//     v[2 j + 1 − k] += w[k] x[j]    y[p] = v[p] + v[p − 1]
// and on the way back of its gradient g, where points are gathered; the weight's gradient is of the same sums:
//     h[p] = g[p − 1] + g[p]    Σ_k w[k] h[2 j + 2 − k]    Σ_j x[j] h[2 j + 2 − k]
#pragma once

#include <cstdint>

#include "math/portable.h"

namespace timm_ext::cpu {

constexpr int64_t kStridedOutputs = 8;  // channels of the output that are computed together
constexpr int64_t kStridedTaps = 27;

/// Weights at these steps, whose taps lie side by side; mirrored: the last tap first.
struct StridedWeights {
  const float* from;
  int64_t outputs;
  int64_t inputs;
  int64_t output_step;
  int64_t input_step;
  bool mirrored;
  bool taps_outside;  // [blocks, taps, inputs, outputs of a block], else [blocks, inputs, taps, outputs of a block]
  float* to;
};

/// Elements from a tap to the next where taps are outside: not a multiple of a page, since they are written in turn.
TIMM_EXT_FN int64_t strided_tap_step(int64_t inputs) { return inputs * kStridedOutputs + 16; }
TIMM_EXT_FN int64_t strided_block_elements(int64_t inputs) { return kStridedTaps * strided_tap_step(inputs); }

struct StridedConvProblem {
  int64_t examples;
  int64_t outputs;  // channels
  int64_t inputs;
  int64_t small[3];      // sizes of the smaller volume
  int64_t large[3];      // of the larger one: gathered, twice those and one; scattered, twice those or one less
  bool upsampled;        // of what is scattered, each point and those before it are added
  const float* input;    // [examples, inputs, large] to be gathered, or small to be scattered
  const float* weights;  // by strided_weights, taps outside to be scattered
  const float* bias;     // [outputs], or null for none; for what is scattered
  float* output;         // [examples, outputs, small], or large
  int64_t chunk;         // planes of the input that are scattered together

  TIMM_EXT_FN int64_t points() const { return small[0] * small[1] * small[2]; }
  TIMM_EXT_FN int64_t large_points() const { return large[0] * large[1] * large[2]; }
};

TIMM_EXT_FN int64_t strided_blocks(int64_t outputs) { return (outputs + kStridedOutputs - 1) / kStridedOutputs; }

/// Units of work: a plane of the output of one example, or a chunk of planes of the input of one, for a block of
/// outputs.
TIMM_EXT_FN int64_t gather_units(const StridedConvProblem& p) { return p.examples * p.small[0]; }
TIMM_EXT_FN int64_t scatter_chunks(const StridedConvProblem& p) { return (p.small[0] + p.chunk - 1) / p.chunk; }
TIMM_EXT_FN int64_t scatter_units(const StridedConvProblem& p) {
  return p.examples * strided_blocks(p.outputs) * scatter_chunks(p);
}

}  // namespace timm_ext::cpu
