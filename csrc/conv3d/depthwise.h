// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "conv3d/problem.h"

namespace timm_ext {

constexpr int64_t kDepthwisePacked = int64_t{1} << 28;  // elements of a packed channel at most

/// Whether the depthwise kernels take a convolution: each group has one input and one output, and its phases fit.
inline bool depthwise_fits(const ConvShape& s, int64_t groups) {
  if (s.outputs != 1 || s.inputs != 1 || groups < 2) return false;
  int64_t elements = 1;
  for (int a = 0; a < 3; ++a) {
    // Of all phases of an axis, with what lies beyond the last point of each.
    const int64_t phases = s.stride[a] < s.kernel[a] ? s.stride[a] : s.kernel[a];
    const int64_t size = s.out[a] + (s.kernel[a] - 1) * s.dilation[a] / s.stride[a] + 16;
    if (__builtin_mul_overflow(elements, phases * size, &elements) || elements > kDepthwisePacked) return false;
  }
  return true;
}

}  // namespace timm_ext
