// SPDX-License-Identifier: Apache-2.0
//
// The factors that Winograd's F(2, 3) makes of the input, on two axes one after the other.
#pragma once

#include "math/simd.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

/// Of four inputs of an axis, the factors of the four products.
template <class C>
TIMM_EXT_FN void input_factors(const C (&x)[4], C (&to)[4]) {
  to[0] = x[0] - x[2];
  to[1] = x[1] + x[2];
  to[2] = x[2] - x[1];
  to[3] = x[1] - x[3];
}

/// Of four by four rows at `place`, 16 of C, `form` elements apart.
template <class C>
TIMM_EXT_FN void write_input_forms(const float* const* rows, int64_t place, float* to, int64_t form) {
  C over_rows[4][4];
  for (int d = 0; d < 4; ++d) {
    C x[4];
    for (int h = 0; h < 4; ++h) x[h] = math::load<C>(rows[4 * d + h] + place);
    input_factors(x, over_rows[d]);
  }
  for (int h = 0; h < 4; ++h) {
    const C x[4] = {over_rows[0][h], over_rows[1][h], over_rows[2][h], over_rows[3][h]};
    C factors[4];
    input_factors(x, factors);
    for (int d = 0; d < 4; ++d) math::store(to + (4 * d + h) * form, factors[d]);
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
