// SPDX-License-Identifier: Apache-2.0
//
// The forms of rows that are taken in pairs: see conv_square.h.
#include "../math/simd.h"
#include "kernels.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

using V = math::FloatV;
constexpr int64_t kLanes = sizeof(V) / sizeof(float);

/// Of two values of grad.
template <class C>
TIMM_EXT_FN void forms_of_two(C g0, C g1, C (&to)[4]) {
  to[0] = g0;
  to[1] = g0 + g1;
  to[2] = g0 - g1;
  to[3] = g1;
}

/// Of four of the input.
template <class C>
TIMM_EXT_FN void forms_of_four(C x0, C x1, C x2, C x3, C (&to)[4]) {
  to[0] = x0 - x2;
  to[1] = x1 + x2;
  to[2] = x2 - x1;
  to[3] = x3 - x1;
}

template <class C>
TIMM_EXT_FN void grad_forms_at(const float* const* rows, int64_t k, float* to, int64_t form) {
  C over_rows[2][4];
  for (int d = 0; d < 2; ++d) {
    forms_of_two(math::load<C>(rows[2 * d] + k), math::load<C>(rows[2 * d + 1] + k), over_rows[d]);
  }
  for (int h = 0; h < 4; ++h) {
    C forms[4];
    forms_of_two(over_rows[0][h], over_rows[1][h], forms);
    for (int d = 0; d < 4; ++d) math::store(to + (4 * d + h) * form + k, forms[d]);
  }
}

template <class C>
TIMM_EXT_FN void input_forms_at(const float* const* rows, int64_t k, float* to, int64_t form) {
  C over_rows[4][4];
  for (int d = 0; d < 4; ++d) {
    C x[4];
    for (int h = 0; h < 4; ++h) x[h] = math::load<C>(rows[4 * d + h] + k);
    forms_of_four(x[0], x[1], x[2], x[3], over_rows[d]);
  }
  for (int h = 0; h < 4; ++h) {
    C forms[4];
    forms_of_four(over_rows[0][h], over_rows[1][h], over_rows[2][h], over_rows[3][h], forms);
    for (int d = 0; d < 4; ++d) math::store(to + (4 * d + h) * form + k, forms[d]);
  }
}

}  // namespace

void conv_grad_forms(const float* const* rows, int64_t row, float* to, int64_t form) {
  int64_t k = 0;
  for (; k + kLanes <= row; k += kLanes) grad_forms_at<V>(rows, k, to, form);
  for (; k < row; ++k) grad_forms_at<float>(rows, k, to, form);
}

void conv_input_forms(const float* const* rows, int64_t row, float* to, int64_t form) {
  int64_t k = 0;
  for (; k + kLanes <= row; k += kLanes) input_forms_at<V>(rows, k, to, form);
  for (; k < row; ++k) input_forms_at<float>(rows, k, to, form);
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
