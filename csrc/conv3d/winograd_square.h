// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "checks.h"
#include "conv3d/conv_square_group.h"
#include "conv3d/problem.h"

namespace timm_ext {

/// What square_on_cpu adds, of one group that cpu::serves_winograd_square.
void square_winograd(const ConvShape&, const Tensor& accumulator, const ConvGroup<float>&, int64_t examples,
                     float scale, bool squared);

}  // namespace timm_ext
