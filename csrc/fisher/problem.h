// SPDX-License-Identifier: Apache-2.0
//
// What is accumulated and drawn for a Fisher, as the kernels of every device see it.
#pragma once

#include <cstdint>

#include "math/element.h"

namespace timm_ext {

/// One accumulator; all is contiguous memory of `elements` entries, on one device.
struct SquareAccumulateItem {
  void* accumulator;             // float, or double when the gradients are kFloat64
  const void* const* gradients;  // [gradients of each] element; host memory
  int64_t elements;              // may be 0
};

/// Logits [examples, classes, voxels] and what is drawn from them. Bernoulli: every logit is a variable of its own and
/// classes is 1. Memory is contiguous and on one device.
struct SampleProblem {
  const void* logits;   // element: kFloat32 or kFloat64
  const int64_t* keys;  // [examples]
  int64_t* labels;      // [examples, voxels], or null where not wanted
  void* scores;         // as the logits
  Element element;
  bool categorical;
  int64_t examples, classes, voxels;
};

}  // namespace timm_ext
