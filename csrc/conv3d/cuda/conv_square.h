// SPDX-License-Identifier: Apache-2.0
//
// Launchers of conv_weight_grad_square_. Same rules as those of the merge (merge/cuda/launchers.h): enqueue only,
// graph-capturable, bitwise repeatable.
#pragma once

#include <cstddef>
#include <cstdint>

#include "conv3d/problem.h"
#include "math/element.h"

namespace timm_ext::cuda {

/// accumulator[o, i, tap] += scale Σ_b (Σ_points grad · input)², summed in float32 over runs of kConvRun points or so,
/// and over the runs in float64. How an example is summed depends on the shape alone, not on the number of examples.
struct ConvSquareProblem {
  const void* grad;    // [examples, groups · shape.outputs, shape.out...] element, contiguous, as the following
  const void* input;   // [examples, groups · shape.inputs, shape.in...] element
  float* accumulator;  // [groups · shape.outputs, shape.inputs, shape.kernel...]
  ConvShape shape;
  int64_t groups;
  int64_t examples;
  Element element;  // kFloat32, kBFloat16 or kFloat16
  float scale;
  int64_t workspace_limit = int64_t{64} << 20;  // bytes; with fewer, sums of many points may be longer than kConvRun
};

constexpr int64_t kConvRun = 4096;

/// Whether 32 bits count the places of every axis and the lines of an example.
bool conv_square_serves(const ConvSquareProblem& problem);

/// Bytes of device workspace, at most the limit; its content needs no initialisation. 0: none is needed.
size_t conv_square_workspace_bytes(const ConvSquareProblem& problem);

/// No size may be 0, and conv_square_serves(problem).
int conv_square(const ConvSquareProblem& problem, void* workspace, void* stream);

}  // namespace timm_ext::cuda
