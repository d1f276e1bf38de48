// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/block.h"
#include "cpu/kernel.h"
#include "fisher/problem.h"

namespace timm_ext::cpu {

/// accumulator[i] += scale Σ g[i]² over `each` gradients for i in [begin, end).
TIMM_EXT_KERNEL(square_accumulate, const SquareAccumulateItem&, int64_t each, Element, double scale, int64_t begin,
                int64_t end);

/// A unit is a block of one example's voxels, example after example.
TIMM_EXT_KERNEL(sample_labels, const SampleProblem&, int64_t first_unit, int64_t last_unit);

}  // namespace timm_ext::cpu
