// SPDX-License-Identifier: Apache-2.0
//
// Nearest-neighbour doubling, and what is behind it: planes and rows come in equal pairs, and where a convolution takes
// them in pairs, some of its products vanish.
#pragma once

#include <cstdint>

#include "../math/conv_shape.h"

namespace timm_ext::cpu {

/// Planes [rows, columns], to be made two of twice as many rows and columns each.
struct DoublingProblem {
  const float* from;
  float* to;
  int64_t rows;
  int64_t columns;
};

/// Whether the pairs in which Winograd's F(2, 3) takes planes and rows can be those that come in pairs.
inline bool may_come_doubled(const math::ConvShape& s) {
  return s.in[0] % 2 == 0 && s.in[1] % 2 == 0 && s.padding[0] % 2 == 1 && s.padding[1] % 2 == 1;
}

/// Whether planes 0 and 1, 2 and 3, … and rows likewise are equal, bit by bit, in all `volumes` [planes, rows, columns]
/// that follow one another. An input that does not come doubled is given up at the first row that differs.
bool comes_doubled(const float* volumes, int64_t count, const int64_t (&size)[3]);

}  // namespace timm_ext::cpu
