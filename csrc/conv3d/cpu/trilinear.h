// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/kernel.h"

namespace timm_ext::cpu {

/// Trilinear upsampling by two, corners not aligned, or its gradient: of volumes [planes, rows, columns] to enlarged
/// ones of twice as many on each axis, or back.
struct TrilinearProblem {
  const float* from;
  float* to;
  int64_t size[3];  // of the small ones
};

/// Enlarged planes of all channels; for the gradient small ones.
TIMM_EXT_KERNEL(upsample_trilinear_planes, const TrilinearProblem&, int64_t first_plane, int64_t last_plane);
TIMM_EXT_KERNEL(upsample_trilinear_gradient_planes, const TrilinearProblem&, int64_t first_plane, int64_t last_plane);

}  // namespace timm_ext::cpu
