// SPDX-License-Identifier: Apache-2.0
//
// Launchers of square_accumulate_ and sample_labels. Same rules as those of the merge (merge/cuda/launchers.h): enqueue
// only, graph-capturable, bitwise repeatable.
#pragma once

#include <cstdint>

#include "fisher/problem.h"

namespace timm_ext::cuda {

/// accumulator[i] += scale Σ_j gradients[i][j]² with `each` >= 1 gradients for every item, in their order. One launch
/// for every kSquareAccumulateGradients gradients of non-empty items. `items` and what they point to in host memory may
/// be freed when the call returns; no two accumulators may overlap.
int square_accumulate(const SquareAccumulateItem* items, int64_t count, int64_t each, Element element, double scale,
                      void* stream);

/// Gradients that fit in the 4 KiB of parameters of one launch.
constexpr int kSquareAccumulateGradients = 120;

int sample_labels(const SampleProblem& problem, void* stream);

}  // namespace timm_ext::cuda
