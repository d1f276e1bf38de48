// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "conv3d/problem.h"

namespace timm_ext {

/// acc += scale Σ_b G_b², or scale Σ_b G_b where not squared, by the way that suits the shape, which is that of one
/// group. Exchanged: the roles of grad and input are, so that acc is [inputs, outputs, taps], its taps taken backwards;
/// for strides that are not 1. grad and input are both float32 or both bfloat16, acc is float32. grad and input are
/// both float32 or both bfloat16, acc float32.
void square_on_cpu(const ConvShape& shape, const torch::stable::Tensor& acc, const torch::stable::Tensor& grad,
                   const torch::stable::Tensor& input, int64_t groups, float scale, bool exchanged,
                   bool squared = true);

}  // namespace timm_ext
