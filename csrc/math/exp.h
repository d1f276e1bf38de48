// SPDX-License-Identifier: Apache-2.0
//
// Own exp, log and log-sigmoid in double: the same bits on every CPU and thread count, which the math library (chosen
// by CPU) and torch.sigmoid (vector and tail code differ) do not promise. Good to about 1e-15 relative.
#pragma once

#include "scalar.h"

namespace timm_ext::math {

constexpr double kInfinity = __builtin_huge_val();
constexpr double kLn2High = 6.93147180369123816490e-01;  // trailing zeros: n·kLn2High is exact for |n| < 2^20
constexpr double kLn2Low = 1.90821492927058770002e-10;

/// exp(x) for x <= 0; exactly 1 at 0, 0 below -708 and at -inf, NaN for NaN.
TIMM_EXT_FN double exp_nonpositive(double x) {
  if (x != x) return x;
  if (x < -708.0) return 0.0;
  const double shifter = 6755399441055744.0;  // 1.5·2^52: adding it rounds to an integer
  const double n = (x * 1.4426950408889634 + shifter) - shifter;
  const double r = (x - n * kLn2High) - n * kLn2Low;  // |r| <= ln2 / 2
  double sum = 1.6059043836821613e-10;                // Taylor series; the remainder is below 5e-18
  sum = sum * r + 2.08767569878681e-09;
  sum = sum * r + 2.505210838544172e-08;
  sum = sum * r + 2.755731922398589e-07;
  sum = sum * r + 2.7557319223985893e-06;
  sum = sum * r + 2.48015873015873e-05;
  sum = sum * r + 0.0001984126984126984;
  sum = sum * r + 0.001388888888888889;
  sum = sum * r + 0.008333333333333333;
  sum = sum * r + 0.041666666666666664;
  sum = sum * r + 0.16666666666666666;
  sum = sum * r + 0.5;
  sum = sum * r + 1.0;
  sum = sum * r + 1.0;
  return sum * bit_cast<double>((int64_t{1023} + static_cast<int64_t>(n)) << 52);
}

/// 2·atanh(z) for |z| <= 1/3: log((1 + z) / (1 - z)).
TIMM_EXT_FN double log_from_atanh(double z) {
  const double square = z * z;
  double sum = 0.0;
  for (int k = 37; k >= 1; k -= 2) sum = sum * square + 1.0 / k;
  return 2.0 * z * sum;
}

/// log(x) for x > 0; -inf at 0, NaN for negative x and NaN, inf for inf.
TIMM_EXT_FN double log_positive(double x) {
  if (!(x > 0.0)) return x == 0.0 ? -kInfinity : kInfinity - kInfinity + x;
  if (x == kInfinity) return x;
  int64_t exponent = -1023;
  if (x < 2.2250738585072014e-308) {
    x *= 18014398509481984.0;  // 2^54
    exponent -= 54;
  }
  const int64_t bits = bit_cast<int64_t>(x);
  exponent += bits >> 52;
  double m = bit_cast<double>((bits & ((int64_t{1} << 52) - 1)) | (int64_t{1023} << 52));
  if (m > 1.4142135623730951) {
    m *= 0.5;
    exponent += 1;
  }
  const double n = static_cast<double>(exponent);
  return n * kLn2High + (n * kLn2Low + log_from_atanh((m - 1.0) / (m + 1.0)));
}

/// log(σ(x)) = min(x, 0) - log(1 + exp(-|x|)).
TIMM_EXT_FN double log_sigmoid(double x) {
  const double tail = exp_nonpositive(x < 0.0 ? x : -x);
  return (x < 0.0 ? x : 0.0) - log_from_atanh(tail / (2.0 + tail));
}

/// σ(x).
TIMM_EXT_FN double sigmoid(double x) {
  const double tail = exp_nonpositive(x < 0.0 ? x : -x);
  return (x < 0.0 ? tail : 1.0) / (1.0 + tail);
}

/// The weight of a log-weight in a row whose largest is `row_max`: exp(log_weight - row_max), in [2^-100, 1] or 0.
/// Below 2^-100 it counts as 0: with the Fisher scaled to at least 2^-23, no product of an element's heaviest Fisher
/// underflows, so Σw = 0 only where every Fisher with a weight is 0. NaN where the row has NaN or no finite entry.
template <class C>
TIMM_EXT_FN C relative_weight(double log_weight, double row_max) {
  const double weight = exp_nonpositive(log_weight - row_max);
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
