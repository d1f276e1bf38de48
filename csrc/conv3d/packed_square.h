// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "checks.h"
#include "conv3d/conv_square_group.h"
#include "conv3d/problem.h"

namespace timm_ext {

/// What square_on_cpu adds, of any convolution, whose grad and input are packed first; stored as S, float or bfloat16.
template <class S>
void square_packed(const ConvShape&, const Tensor& accumulator, const ConvGroup<S>& first_group, int64_t groups,
                   int64_t examples, float scale, bool exchanged, bool squared);

}  // namespace timm_ext
