// SPDX-License-Identifier: Apache-2.0
//
// The merge of one element p of T models, for V = float, double or a vector of them; host and device run this source.
//
//   w_t = α_t F_t      θ* = Σ w_t θ_t / Σ w_t
//
// F is scaled by a power of two from max_t F, so that Σ w neither overflows nor underflows for any float F. The mean is
// taken twice: a first estimate e = Σ w_t θ_t / Σ w, clamped to the hull of the θ_t, then θ* = e + Σ w_t (θ_t - e) / Σ
// w, clamped again. The second pass takes away the rounding of the first; where all θ_t agree, e is exactly that value,
// so the result is, too, and every gradient is exactly 0. Where all F are 0, w_t = α_t.
//
// `Element` gives the inputs of the element:
//   static constexpr bool kWeighted;   // false: F = 1, fisher() is never called
//   V theta(int t) const;  V fisher(int t) const;
//   alpha(int t) const;    // V or its scalar: relative_weight of exp.h, 0 or in [2^-100, 1], not all 0
// fisher(t) must give 0 where alpha(t) is 0, so that a model without weight does not set the scale. NaN passes through.
#pragma once

#include "math/portable.h"
#include "math/scalar.h"
#if !defined(__CUDACC__)
#include "math/simd.h"
#endif

namespace timm_ext::math {

enum class Scaling { kFull, kNone };

/// What forward and backward need of one element.
template <class V, Scaling How = Scaling::kFull>
struct Merge {
  V scale;     // w_t = α_t (F_t scale + rest)
  V rest;      // 1 where every F is 0, else 0
  V inverse;   // 1 / Σ w; Σ w lies in [2^-124, T], so this is a normal number
  V estimate;  // of θ*, within the hull
  V shift;     // θ* - estimate
  V lowest;    // hull of the θ_t
  V highest;
};

/// w_t, scaled.
template <class Element, class V, Scaling How>
TIMM_EXT_FN V merge_weight(const Element& e, const Merge<V, How>& m, int t) {
  if constexpr (Element::kWeighted && How == Scaling::kFull) {
    return (e.fisher(t) * m.scale + m.rest) * e.alpha(t);
  } else if constexpr (Element::kWeighted) {
    return e.fisher(t) * e.alpha(t);
  } else {
    return V{} + e.alpha(t);
  }
}

/// ∂θ*/∂θ_t = w_t / Σ w.
template <class V, Scaling How, class Element>
TIMM_EXT_FN V merge_share(const Element& e, const Merge<V, How>& m, int t) {
  return merge_weight(e, m, t) * m.inverse;
}

/// The value brought into [lowest, highest]; NaN stays.
template <class V, Scaling How>
TIMM_EXT_FN V clamp_to_hull(const Merge<V, How>& m, V value) {
  return smaller(m.highest, larger(m.lowest, value));
}

/// Scale and weights' sum.
template <class V, Scaling How, class Element>
TIMM_EXT_FN V set_scale(const Element& e, int models, Merge<V, How>& m) {
  if constexpr (Element::kWeighted && How == Scaling::kFull) {
    V largest = e.fisher(0);
    for (int t = 1; t < models; ++t) largest = larger(e.fisher(t), largest);
    m.scale = reciprocal_power_of_two(largest);
    m.rest = select(largest > V{}, V{}, V{} + 1);
  }
  V total = merge_weight(e, m, 0);
  for (int t = 1; t < models; ++t) total += merge_weight(e, m, t);
  return total;
}

template <class V, Scaling How = Scaling::kFull, class Element>
TIMM_EXT_FN Merge<V, How> merge(const Element& e, int models) {
  Merge<V, How> m;
  m.inverse = reciprocal(set_scale(e, models, m));
  m.lowest = m.highest = e.theta(0);
  for (int t = 1; t < models; ++t) {
    const V theta = e.theta(t);
    m.lowest = smaller(theta, m.lowest);
    m.highest = larger(theta, m.highest);
  }
  V sum = merge_share(e, m, 0) * e.theta(0);
  for (int t = 1; t < models; ++t) sum += merge_share(e, m, t) * e.theta(t);
  m.estimate = clamp_to_hull(m, sum);
  m.shift = merge_share(e, m, 0) * (e.theta(0) - m.estimate);
  for (int t = 1; t < models; ++t) m.shift += merge_share(e, m, t) * (e.theta(t) - m.estimate);
  return m;
}

/// (θ_0 - θ*) w_0 / Σ w of two models, without θ*: (θ_0 - θ_1) w_0 w_1 / (Σ w)². That of the other is its negative.
template <class V, Scaling How, class Element>
TIMM_EXT_FN V merge_exchange(const Element& e) {
  Merge<V, How> m;
  m.inverse = reciprocal(set_scale(e, 2, m));
  return (e.theta(0) - e.theta(1)) * merge_share(e, m, 0) * merge_share(e, m, 1);
}

/// θ*.
template <class V, Scaling How>
TIMM_EXT_FN V merged_value(const Merge<V, How>& m) {
  return clamp_to_hull(m, m.estimate + m.shift);
}

/// θ_t - θ*.
template <class V, Scaling How, class Element>
TIMM_EXT_FN V merge_offset(const Element& e, const Merge<V, How>& m, int t) {
  return (e.theta(t) - m.estimate) - m.shift;
}

/// ∂θ*/∂F_t = α_t (θ_t - θ*) / Σ α F; 0 where every F is 0, where the merge jumps.
template <class V, Scaling How, class Element>
TIMM_EXT_FN V merge_fisher_slope(const Element& e, const Merge<V, How>& m, int t) {
  const V slope = merge_offset(e, m, t) * m.inverse * e.alpha(t);
  if constexpr (How == Scaling::kNone) return slope;
  return select(m.rest > V{}, V{}, slope * m.scale);
}

}  // namespace timm_ext::math
