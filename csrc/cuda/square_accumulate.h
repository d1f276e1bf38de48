// SPDX-License-Identifier: Apache-2.0
//
// Launcher of square_accumulate_. Same rules as merge.h: enqueue only, graph-capturable, bitwise repeatable.
#pragma once

#include <cstdint>

#include "element.h"

namespace timm_ext::cuda {

/// One tensor of the list; both are contiguous device memory of `elements` entries.
struct SquareAccumulateItem {
  void* accumulator;     // float, or double when the gradients are kFloat64
  const void* gradient;  // element
  int64_t elements;      // may be 0
};

/// accumulator[i] += scale * gradient[i]² for every item, one launch per kSquareAccumulateItems non-empty items.
/// `items` is host memory and may be freed when the call returns; no two accumulators may overlap.
int square_accumulate(const SquareAccumulateItem* items, int64_t count, Element element, double scale, void* stream);

/// Tensors that fit in the 4 KiB of parameters of one launch.
constexpr int kSquareAccumulateItems = 120;

}  // namespace timm_ext::cuda
