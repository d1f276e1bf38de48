// SPDX-License-Identifier: Apache-2.0
//
// One axis of Winograd's convolutions. F(n, 3) multiplies polynomials by their values at n + 1 points and infinity; as
// it is used here, transposed, inputs x0 … and kernel g0, g1, g2 become factors whose products make outputs y0 ….
//
// F(2, 3) is of the points 0, 1, −1:
//     m0 = g0 (x0 − x2)    m1 = (g0 + g1 + g2) / 2 (x1 + x2)    m2 = (g0 − g1 + g2) / 2 (x2 − x1)    m3 = g2 (x1 − x3)
//     y0 = m0 + m1 + m2    y1 = m1 − m2 − m3
// F(4, 3) is of 0, ±a, ±b. Of all a and b with few digits, these give the least error: half of that of 1 and 2. F(2, 5)
// is of the same points, so that its inputs become the same factors.
#pragma once

#include "conv3d/cpu/row_forms.h"
#include "math/portable.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

/// F(Outputs, Taps); of one output, the axis as it is.
template <int Outputs, int Taps = 3>
struct WinogradAxis;

template <>
struct WinogradAxis<1> {
  static constexpr int kTaps = 1, kForms = 1, kOutputs = 1;

  template <class C>
  static TIMM_EXT_FN void inputs(const C (&x)[1], C (&to)[1]) {
    to[0] = x[0];
  }
  template <class C>
  static TIMM_EXT_FN void weights(const C (&g)[1], C (&to)[1]) {
    to[0] = g[0];
  }
  template <class C>
  static TIMM_EXT_FN void outputs(const C (&m)[1], C (&y)[1]) {
    y[0] = m[0];
  }
};

template <>
struct WinogradAxis<2> {
  static constexpr int kTaps = 3, kForms = 4, kOutputs = 2;

  template <class C>
  static TIMM_EXT_FN void inputs(const C (&x)[4], C (&to)[4]) {
    input_factors(x, to);
  }
  template <class C>
  static TIMM_EXT_FN void weights(const C (&g)[3], C (&to)[4]) {
    const C outer = 0.5f * (g[0] + g[2]), middle = 0.5f * g[1];
    to[0] = g[0];
    to[1] = outer + middle;
    to[2] = outer - middle;
    to[3] = g[2];
  }
  template <class C>
  static TIMM_EXT_FN void outputs(const C (&m)[4], C (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
};

template <>
struct WinogradAxis<4> {
  static constexpr int kTaps = 3, kForms = 6, kOutputs = 4;
  static constexpr float kA = 0.6875f, kB = 1.5f;
  static constexpr float kA2 = kA * kA, kB2 = kB * kB;  // exact, and so are their sum and product

  template <class C>
  static TIMM_EXT_FN void inputs(const C (&x)[6], C (&to)[6]) {
    const C even_a = x[4] - kB2 * x[2], odd_a = x[3] - kB2 * x[1];
    const C even_b = x[4] - kA2 * x[2], odd_b = x[3] - kA2 * x[1];
    to[0] = x[4] - (kA2 + kB2) * x[2] + kA2 * kB2 * x[0];
    to[1] = even_a + kA * odd_a;
    to[2] = even_a - kA * odd_a;
    to[3] = even_b + kB * odd_b;
    to[4] = even_b - kB * odd_b;
    to[5] = x[5] - (kA2 + kB2) * x[3] + kA2 * kB2 * x[1];
  }
  template <class C>
  static TIMM_EXT_FN void weights(const C (&g)[3], C (&to)[6]) {
    constexpr float zero = 1 / (kA2 * kB2), a = 0.5f / (kA2 * (kA2 - kB2)), b = 0.5f / (kB2 * (kB2 - kA2));
    const C outer_a = a * (g[0] + kA2 * g[2]), middle_a = a * kA * g[1];
    const C outer_b = b * (g[0] + kB2 * g[2]), middle_b = b * kB * g[1];
    to[0] = zero * g[0];
    to[1] = outer_a + middle_a;
    to[2] = outer_a - middle_a;
    to[3] = outer_b + middle_b;
    to[4] = outer_b - middle_b;
    to[5] = g[2];
  }
  template <class C>
  static TIMM_EXT_FN void outputs(const C (&m)[6], C (&y)[4]) {
    const C even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + even_a + even_b;
    y[1] = kA * odd_a + kB * odd_b;
    y[2] = kA2 * even_a + kB2 * even_b;
    y[3] = kA * kA2 * odd_a + kB * kB2 * odd_b + m[5];
  }
};

template <>
struct WinogradAxis<2, 5> {
  using Points = WinogradAxis<4>;
  static constexpr int kTaps = 5, kForms = 6, kOutputs = 2;
  static constexpr float kA = Points::kA, kB = Points::kB, kA2 = Points::kA2, kB2 = Points::kB2;

  template <class C>
  static TIMM_EXT_FN void inputs(const C (&x)[6], C (&to)[6]) {
    Points::inputs(x, to);
  }
  template <class C>
  static TIMM_EXT_FN void weights(const C (&g)[5], C (&to)[6]) {
    constexpr float zero = 1 / (kA2 * kB2), a = 0.5f / (kA2 * (kA2 - kB2)), b = 0.5f / (kB2 * (kB2 - kA2));
    const C even_a = a * (g[0] + kA2 * (g[2] + kA2 * g[4])), odd_a = a * kA * (g[1] + kA2 * g[3]);
    const C even_b = b * (g[0] + kB2 * (g[2] + kB2 * g[4])), odd_b = b * kB * (g[1] + kB2 * g[3]);
    to[0] = zero * g[0];
    to[1] = even_a + odd_a;
    to[2] = even_a - odd_a;
    to[3] = even_b + odd_b;
    to[4] = even_b - odd_b;
    to[5] = g[4];
  }
  template <class C>
  static TIMM_EXT_FN void outputs(const C (&m)[6], C (&y)[2]) {
    y[0] = m[0] + (m[1] + m[2]) + (m[3] + m[4]);
    y[1] = kA * (m[1] - m[2]) + kB * (m[3] - m[4]) + m[5];
  }
};

/// Calls f with the axes of planes and of rows, as null pointers; `taps` are those of the rows.
template <class F>
void with_winograd_axes(int64_t taps, int64_t planes, int64_t rows, const F& f) {
  const auto with_planes = [&](auto* none, auto* two, auto* four, auto* row_axis) {
    if (planes == 1) {
      f(none, row_axis);
    } else if (planes == 2) {
      f(two, row_axis);
    } else {
      f(four, row_axis);
    }
  };
  auto* const none = static_cast<WinogradAxis<1>*>(nullptr);
  auto* const two = static_cast<WinogradAxis<2>*>(nullptr);
  auto* const four = static_cast<WinogradAxis<4>*>(nullptr);
  auto* const two_of_five = static_cast<WinogradAxis<2, 5>*>(nullptr);
  if (taps == 5) {
    with_planes(none, two_of_five, two_of_five, two_of_five);
  } else if (rows == 4) {
    with_planes(none, two, four, four);
  } else {
    with_planes(none, two, four, two);
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
