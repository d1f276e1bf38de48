// SPDX-License-Identifier: Apache-2.0
//
// Cases of conv_weight_grad_square_ and their truth by plain loops in double; host code, whatever runs the kernel.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "conv3d/cuda/conv_square.h"
#include "tests/elements.h"

namespace timm_ext::test {

struct ConvSpec {
  Element element;
  int64_t examples, groups, outputs, inputs;  // channels of a group
  int64_t in[3];
  int64_t kernel[3];
  int64_t stride[3] = {1, 1, 1};
  int64_t padding[3] = {0, 0, 0};
  int64_t dilation[3] = {1, 1, 1};
  int64_t cut = 0;        // places of the last axis of the output without a gradient
  int64_t offset = 0;     // of the first element from a 16-byte boundary
  bool one_sign = false;  // nothing cancels: the largest errors of long sums
  int64_t workspace_limit = int64_t{64} << 20;
  std::string name() const;
};

std::vector<ConvSpec> conv_table();

/// Grad, input and accumulator drawn from a seed.
struct ConvCase {
  ConvSpec spec;
  ConvShape shape;
  Buffer grad, input;
  std::vector<float> accumulator;

  ConvCase(const ConvSpec& spec, uint64_t seed);
  cuda::ConvSquareProblem problem();
  void check_result() const;

 private:
  std::vector<double> truth_;
};

}  // namespace timm_ext::test
