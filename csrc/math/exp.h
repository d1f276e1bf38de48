// SPDX-License-Identifier: Apache-2.0
//
// Own exp, log and log-sigmoid in double: the same bits on every CPU and thread count, which the math library (chosen
// by CPU) and torch.sigmoid (vector and tail code differ) do not promise. Good to about 1e-15 relative.
#pragma once

#include "math/scalar.h"
#if !defined(__CUDACC__)
#include "math/simd.h"
#endif

namespace timm_ext::math {

constexpr double kInfinity = __builtin_huge_val();
constexpr double kLn2High = 6.93147180369123816490e-01;  // trailing zeros: n·kLn2High is exact for |n| < 2^20
constexpr double kLn2Low = 1.90821492927058770002e-10;

/// Terms of the series below that are due when the result is rounded to C.
template <class C>
constexpr int kExpTerms = sizeof(C) == sizeof(float) ? 9 : 14;
template <class C>
constexpr int kLogTerms = sizeof(C) == sizeof(float) ? 15 : 37;

/// exp(x) for x <= 0, of a double or a vector of them, by `Terms` terms of the Taylor series: 14 give 1e-15 relative,
/// 10 give 1e-9. Exactly 1 at 0, 0 below -708 and at -inf, NaN for NaN.
template <int Terms = 14, class V>
TIMM_EXT_FN V exp_nonpositive(V x) {
  constexpr double kInverseFactorial[] = {1.0,
                                          1.0,
                                          0.5,
                                          0.16666666666666666,
                                          0.041666666666666664,
                                          0.008333333333333333,
                                          0.001388888888888889,
                                          0.0001984126984126984,
                                          2.48015873015873e-05,
                                          2.7557319223985893e-06,
                                          2.755731922398589e-07,
                                          2.505210838544172e-08,
                                          2.08767569878681e-09,
                                          1.6059043836821613e-10};
  const double shifter = 6755399441055744.0;  // 1.5·2^52: adding it rounds to an integer, found in the last bits
  const V shifted = x * 1.4426950408889634 + shifter;
  const V n = shifted - shifter;
  const V r = (x - n * kLn2High) - n * kLn2Low;  // |r| <= ln2 / 2
  V sum = r * kInverseFactorial[Terms - 1] + kInverseFactorial[Terms - 2];
  for (int k = Terms - 3; k >= 0; --k) sum = sum * r + kInverseFactorial[k];
  const V result = sum * from_bits((bits_of(shifted) + 1023) << 52);
  return select(x >= -708.0, result, select(x < -708.0, V{}, x));
}

/// exp(x) for x <= 0 in the arithmetic of float, of a float or a vector of them, good to 1.5e-7 relative; 0 below -87.
template <class V>
TIMM_EXT_FN V exp_nonpositive_float(V x) {
  constexpr float kInverseFactorial[] = {1.0f,         1.0f,          0.5f,          1.0f / 6.0f,
                                         1.0f / 24.0f, 1.0f / 120.0f, 1.0f / 720.0f, 1.0f / 5040.0f};
  const float shifter = 12582912.0f;  // 1.5·2^23
  const V shifted = x * 1.44269502f + shifter;
  const V n = shifted - shifter;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V sum = r * kInverseFactorial[7] + kInverseFactorial[6];
  for (int k = 5; k >= 0; --k) sum = sum * r + kInverseFactorial[k];
  const V result = sum * from_bits((bits_of(shifted) + 127) << 23);
  return select(x >= -87.0f, result, select(x < -87.0f, V{}, x));
}

/// 2·atanh(z) for |z| <= 1/3, log((1 + z) / (1 - z)), by the odd powers of z up to `Last`: 37 give 1e-18 relative, 15
/// give 1e-9.
template <int Last = 37, class V>
TIMM_EXT_FN V log_from_atanh(V z) {
  const V square = z * z;
  V sum = V{} + 1.0 / Last;
  for (int k = Last - 2; k >= 1; k -= 2) sum = sum * square + 1.0 / k;
  return 2.0 * z * sum;
}

/// log(x) for x > 0; -inf at 0, NaN for negative x and NaN, inf for inf.
template <int Last = 37, class V>
TIMM_EXT_FN V log_positive(V x) {
  const auto small = x < 2.2250738585072014e-308;
  const auto bits = bits_of(select(small, x * 18014398509481984.0, x));  // 2^54
  // The exponent as the last bits of a double in [2^52, 2^53).
  const V biased = from_bits((bits >> 52) | 0x4330000000000000) - 4503599627370496.0;
  const V m = from_bits((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000);
  const auto high = m > 1.4142135623730951;
  const V mantissa = select(high, m * 0.5, m);
  const V n = biased - select(small, V{} + 1077.0, V{} + 1023.0) + select(high, V{} + 1.0, V{});
  const V log = n * kLn2High + (n * kLn2Low + log_from_atanh<Last>((mantissa - 1.0) / (mantissa + 1.0)));
  const V at_ends = select(x == kInfinity, x, select(x == 0.0, V{} - kInfinity, V{} + (kInfinity - kInfinity)));
  return select(x > 0.0, select(x < kInfinity, log, at_ends), at_ends);
}

/// log(σ(x)) = min(x, 0) - log(1 + exp(-|x|)).
template <int Terms = 14, int Last = 37, class V>
TIMM_EXT_FN V log_sigmoid(V x) {
  const V tail = exp_nonpositive<Terms>(select(x < 0.0, x, -x));
  return select(x < 0.0, x, V{}) - log_from_atanh<Last>(tail / (2.0 + tail));
}

/// σ(x).
template <int Terms = 14, class V>
TIMM_EXT_FN V sigmoid(V x) {
  const V tail = exp_nonpositive<Terms>(select(x < 0.0, x, -x));
  return select(x < 0.0, tail, V{} + 1.0) / (1.0 + tail);
}

/// The weight of a log-weight in a row whose largest is `row_max`: exp(log_weight - row_max), in [2^-100, 1] or 0.
/// Below 2^-100 it counts as 0: with the Fisher scaled to at least 2^-23, no product of an element's heaviest Fisher
/// underflows, so Σw = 0 only where every Fisher with a weight is 0. NaN where the row has NaN or no finite entry.
template <class C>
TIMM_EXT_FN C relative_weight(double log_weight, double row_max) {
  const double weight = exp_nonpositive<kExpTerms<C>>(log_weight - row_max);
  return static_cast<C>(weight < 7.888609052210118e-31 ? 0.0 : weight);
}

/// The largest entry of a row of log-weights; NaN when one of them is NaN, +inf or all are -inf.
template <class L>
TIMM_EXT_FN double row_maximum(const L* log_weight, int64_t models) {
  double best = -kInfinity;
  for (int64_t t = 0; t < models; ++t) {
    const double value = log_weight[t];
    if (!(value < kInfinity)) return kInfinity - kInfinity;
    best = value > best ? value : best;
  }
  return best + (best - best);  // -inf becomes NaN
}

}  // namespace timm_ext::math
