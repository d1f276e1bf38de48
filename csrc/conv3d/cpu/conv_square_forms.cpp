// SPDX-License-Identifier: Apache-2.0
//
// The forms of rows that are taken in pairs: see conv_square.h.
#include "conv3d/cpu/kernels.h"
#include "conv3d/cpu/row_forms.h"
#include "cpu/lanes.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

/// Of two values of grad.
template <class C>
TIMM_EXT_FN void forms_of_two(C g0, C g1, C (&to)[4]) {
  to[0] = g0;
  to[1] = g0 + g1;
  to[2] = g0 - g1;
  to[3] = -g1;
}

template <class C>
TIMM_EXT_FN void write_grad_forms(const float* const* rows, int64_t place, float* to, int64_t form) {
  C over_rows[2][4];
  for (int d = 0; d < 2; ++d) {
    forms_of_two(math::load<C>(rows[2 * d] + place), math::load<C>(rows[2 * d + 1] + place), over_rows[d]);
  }
  for (int h = 0; h < 4; ++h) {
    C forms[4];
    forms_of_two(over_rows[0][h], over_rows[1][h], forms);
    for (int d = 0; d < 4; ++d) math::store(to + (4 * d + h) * form, forms[d]);
  }
}

}  // namespace

void conv_grad_forms(const float* const* rows, int64_t row, float* to, int64_t form) {
  int64_t k = 0;
  for (; k + kLanes <= row; k += kLanes) write_grad_forms<V>(rows, k, to + k, form);
  for (; k < row; ++k) write_grad_forms<float>(rows, k, to + k, form);
}

void conv_input_forms(const float* const* rows, int64_t row, float* to, int64_t form) {
  int64_t k = 0;
  for (; k + kLanes <= row; k += kLanes) write_input_forms<V>(rows, k, to + k, form);
  for (; k < row; ++k) write_input_forms<float>(rows, k, to + k, form);
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
