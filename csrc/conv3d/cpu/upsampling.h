// SPDX-License-Identifier: Apache-2.0
//
// Nearest-neighbour upsampling by two, and the sums of neighbours through which its gradient goes (see strided_conv.h).
#pragma once

#include <cstdint>

namespace timm_ext::cpu {

/// Planes [rows, columns], to be made two of twice as many rows and columns each.
struct UpsamplingProblem {
  const float* from;
  float* to;
  int64_t rows;
  int64_t columns;
};

/// Volumes [planes, rows, columns], to be made sums of 2 × 2 × 2 neighbours with zeros around, one more on each axis.
struct NeighbourSumsProblem {
  const float* from;
  float* to;
  int64_t size[3];
};

}  // namespace timm_ext::cpu
