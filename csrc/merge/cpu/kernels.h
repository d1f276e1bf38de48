// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/block.h"
#include "cpu/kernel.h"
#include "merge/problem.h"

namespace timm_ext::cpu {

/// How logits become weights: σ(δ), exp(δ) or δ itself.
enum class Mixing { kSigmoid, kSoftmax, kRatios };

/// `streamed`: the result is too large for the caches and goes past them.
TIMM_EXT_KERNEL(merge_forward, const MergeInputs&, void* merged, bool streamed, int64_t first_block,
                int64_t last_block);

/// Writes the rows of segments inside one block; the sums of cut segments go to `edges` [blocks, 2, T], first the
/// segment that enters the block, then the one that leaves it.
TIMM_EXT_KERNEL(merge_backward_log_weight, const MergeInputs&, const MergeGradient&, void* grad_log_weight,
                double* edges, int64_t first_block, int64_t last_block);

/// Adds up the edges of cut segments, block by block, and writes their rows.
void stitch_edges(const MergeInputs& inputs, const double* edges, void* grad_log_weight);

TIMM_EXT_KERNEL(merge_backward_matrices, const MergeInputs&, const MergeGradient&, const MergeMatrixGradients&,
                int64_t first_block, int64_t last_block);

/// Rows of `models` logits, of Element kFloat32 or kFloat64.
TIMM_EXT_KERNEL(log_weights, Mixing, Element, const void* logits, void* out, int64_t models, int64_t first_row,
                int64_t last_row);
TIMM_EXT_KERNEL(log_weights_backward, Mixing, Element, const void* grad, const void* logits, void* out, int64_t models,
                int64_t first_row, int64_t last_row);

}  // namespace timm_ext::cpu
