// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/kernel.h"

namespace timm_ext::cpu {

/// Which maps share a mean and a variance; a map is one channel of one example.
struct NormSets {
  int64_t count;
  int64_t members;   // maps of a set
  int64_t step;      // from one map of a set to its next
  int64_t set_step;  // from the first map of a set to that of the next
  int64_t channels;
  int64_t points;  // of a map

  int64_t map(int64_t set, int64_t member) const { return set * set_step + member * step; }
  int64_t set_of(int64_t map) const { return step == 1 ? map / members : map % count; }
};

/// weight (x - mean) / sqrt(variance + epsilon) + bias.
struct NormProblem {
  const float* input;   // [maps, points]
  const float* weight;  // [channels], or null for 1
  const float* bias;    // [channels], or null for 0
  float* output;        // [maps, points]
  float* mean;          // [sets]
  float* variance;      // [sets]
  double* moments;      // [maps, 2], between the kernels
  double epsilon;
  NormSets sets;
};

/// The gradients of leaky(weight (x - mean) / sqrt(variance + epsilon) + bias).
struct NormGradient {
  const float* grad;      // [maps, points], of each example apart
  const float* input;     // [maps, points]
  const float* mean;      // [sets], or null for 0
  const float* variance;  // [sets], or null for 1 / sqrt(variance + epsilon) = 1
  const float* weight;    // [channels], or null for 1
  const float* bias;      // [channels], or null for 0
  const float* slope;     // of what lies below zero, of all channels or of each; null for 1
  float* grad_input;      // [maps, points]
  float* grad_weight;     // [maps]
  float* grad_bias;       // [maps]
  float* grad_slope;      // [maps], or null
  double* sums;           // [maps, 2], between the kernels; then of a set in its first map's place
  double epsilon;
  int64_t slope_step;    // 0 for one slope
  int64_t grad_example;  // elements of grad from one example to the next
  bool constant;         // mean and variance do not depend on the input
  NormSets sets;
};

/// Set by set, or map by map in three steps, of which each needs the one before it; the bits are the same.
TIMM_EXT_KERNEL(normalise_sets, const NormProblem&, int64_t first_set, int64_t last_set);
TIMM_EXT_KERNEL(norm_moments, const NormProblem&, int64_t first_map, int64_t last_map);
TIMM_EXT_KERNEL(norm_statistics, const NormProblem&, int64_t first_set, int64_t last_set);
TIMM_EXT_KERNEL(norm_write, const NormProblem&, int64_t first_map, int64_t last_map);

/// Likewise. Where mean and variance are constant, the sums write the gradient, too, and are all there is to do.
TIMM_EXT_KERNEL(norm_backward_sets, const NormGradient&, int64_t first_set, int64_t last_set);
TIMM_EXT_KERNEL(norm_backward_sums, const NormGradient&, int64_t first_map, int64_t last_map);
TIMM_EXT_KERNEL(norm_backward_totals, const NormGradient&, int64_t first_set, int64_t last_set);
TIMM_EXT_KERNEL(norm_backward_write, const NormGradient&, int64_t first_map, int64_t last_map);

}  // namespace timm_ext::cpu
