// SPDX-License-Identifier: Apache-2.0
//
// Merge kernels for any T and every element type, one element per lane: what the packed kernels do not serve, float64
// (for checks of gradients) and more models than those take.
#pragma once

#include "merge/cuda/stitch.h"

namespace timm_ext::cuda {

int merge_forward_general(const MergeInputs& in, void* merged, void* stream);
int merge_backward_general(const MergeInputs& in, const MergeGradient& gradient, const Tiling& tiling,
                           const Edges& edges, void* grad_log_weight, void* stream);
int merge_matrices_general(const MergeInputs& in, const MergeGradient& gradient, const MergeMatrixGradients& outputs,
                           void* stream);

}  // namespace timm_ext::cuda
