// SPDX-License-Identifier: Apache-2.0
//
// Merge kernels for any T and every element type, one element per lane: float64, more than 8 models, and the
// gradients of the planes, where reading and writing 4T + 1 planes leaves nothing to gain from registers.
#pragma once

#include "merge_stitch.h"

namespace timm_ext::cuda {

int merge_forward_general(const MergeInputs& in, void* merged, void* stream);
int merge_backward_general(const MergeInputs& in, const MergeGradient& gradient, const Tiling& tiling,
                           const Edges& edges, void* grad_log_weight, void* stream);

}  // namespace timm_ext::cuda
