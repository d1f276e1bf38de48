// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "conv3d/problem.h"

namespace timm_ext {

/// Whether a convolution is pointwise, between so few channels and at so many points that packing does not pay.
bool pointwise_fits(const ConvShape& shape, int64_t groups);

/// acc [O, I] += scale Σ_b G_b², or scale Σ_b G_b where not squared.
void square_pointwise(const torch::stable::Tensor& acc, const torch::stable::Tensor& grad,
                      const torch::stable::Tensor& input, float scale, bool squared);

}  // namespace timm_ext
