// SPDX-License-Identifier: Apache-2.0
//
// Launcher of square_accumulate_. Same rules as merge.h: enqueue only, graph-capturable, bitwise repeatable.
#pragma once

#include <cstdint>

#include "element.h"

namespace timm_ext::cuda {

/// One accumulator; all is contiguous device memory of `elements` entries.
struct SquareAccumulateItem {
  void* accumulator;             // float, or double when the gradients are kFloat64
  const void* const* gradients;  // [gradients of each] element; host memory
  int64_t elements;              // may be 0
};

/// accumulator[i] += scale Σ_j gradients[i][j]² with `each` >= 1 gradients for every item, in their order. One launch
/// for every kSquareAccumulateGradients gradients of non-empty items. `items` and what they point to in host memory may
/// be freed when the call returns; no two accumulators may overlap.
int square_accumulate(const SquareAccumulateItem* items, int64_t count, int64_t each, Element element, double scale,
                      void* stream);

/// Gradients that fit in the 4 KiB of parameters of one launch.
constexpr int kSquareAccumulateGradients = 120;

}  // namespace timm_ext::cuda
