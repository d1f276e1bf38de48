// SPDX-License-Identifier: Apache-2.0
//
// Launcher of sample_labels. Same rules as merge.h: enqueue only, graph-capturable, bitwise repeatable.
#pragma once

#include <cstdint>

#include "element.h"

namespace timm_ext::cuda {

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

int sample_labels(const SampleProblem& problem, void* stream);

}  // namespace timm_ext::cuda
