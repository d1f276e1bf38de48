// SPDX-License-Identifier: Apache-2.0
//
// The merge of one element p of T models, for V = float, double or a vector of them; host and device run this source.
//
//   w_t = α_t F_t      θ* = Σ w_t θ_t / Σ w_t
//
// F is scaled by a power of two taken from max_t F, so that w neither overflows nor underflows for any float F.
// The sum is taken around the heaviest model m, θ* = θ_m + Σ w_t (θ_t - θ_m) / Σ w, and clamped to the hull of the θ_t:
// where all θ_t agree the result is exactly that value and every gradient exactly 0. Where all F are 0, w_t = α_t.
//
// `Element` gives the inputs of the element:
//   static constexpr bool kWeighted;   // false: F = 1, fisher() is never called
//   V theta(int t) const;  V fisher(int t) const;
//   alpha(int t) const;    // V or its scalar: relative_weight of exp.h, in [0, 1], one of them 1
// fisher(t) must give 0 where alpha(t) is 0, so that a model without weight does not set the scale. NaN passes through.
#pragma once

#include "portable.h"
#include "scalar.h"
#if !defined(__CUDACC__)
#include "simd.h"
#endif

namespace timm_ext::math {

/// What forward and backward need of one element.
template <class V>
struct Merge {
  V scale;   // w_t = α_t (F_t scale + rest)
  V rest;    // 1 where every F is 0, else 0
  V total;   // Σ w
  V pivot;   // θ of the heaviest model
  V shift;   // θ* - pivot
  V lowest;  // hull of the θ_t
  V highest;
};

/// w_t, scaled.
template <class Element, class V>
TIMM_EXT_FN V merge_weight(const Element& e, const Merge<V>& m, int t) {
  if constexpr (Element::kWeighted) {
    return (e.fisher(t) * m.scale + m.rest) * e.alpha(t);
  } else {
    return V{} + e.alpha(t);
  }
}

template <class V, class Element>
TIMM_EXT_FN Merge<V> merge(const Element& e, int models) {
  Merge<V> m;
  if constexpr (Element::kWeighted) {
    V largest = e.fisher(0);
    for (int t = 1; t < models; ++t) largest = select(e.fisher(t) > largest, e.fisher(t), largest);
    m.scale = reciprocal_power_of_two(largest);
    m.rest = select(largest > V{}, V{}, V{} + 1);
  }
  V heaviest = merge_weight(e, m, 0);
  m.total = heaviest;
  m.pivot = m.lowest = m.highest = e.theta(0);
  for (int t = 1; t < models; ++t) {
    const V w = merge_weight(e, m, t);
    const V theta = e.theta(t);
    m.total += w;
    m.pivot = select(w > heaviest, theta, m.pivot);
    heaviest = select(w > heaviest, w, heaviest);
    m.lowest = select(theta < m.lowest, theta, m.lowest);
    m.highest = select(theta > m.highest, theta, m.highest);
  }
  V sum = merge_weight(e, m, 0) * (e.theta(0) - m.pivot);
  for (int t = 1; t < models; ++t) sum += merge_weight(e, m, t) * (e.theta(t) - m.pivot);
  m.shift = sum / m.total;
  return m;
}

/// θ*.
template <class V>
TIMM_EXT_FN V merged_value(const Merge<V>& m) {
  const V value = m.pivot + m.shift;
  const V raised = select(value < m.lowest, m.lowest, value);
  return select(raised > m.highest, m.highest, raised);
}

/// ∂θ*/∂θ_t = w_t / Σ w. Σ w lies in [2^-124, T], so its reciprocal is a normal number, and one division serves all t.
template <class V, class Element>
TIMM_EXT_FN V merge_share(const Element& e, const Merge<V>& m, int t) {
  return merge_weight(e, m, t) * ((V{} + 1) / m.total);
}

/// θ_t - θ*.
template <class V, class Element>
TIMM_EXT_FN V merge_offset(const Element& e, const Merge<V>& m, int t) {
  return (e.theta(t) - m.pivot) - m.shift;
}

/// ∂θ*/∂F_t = α_t (θ_t - θ*) / Σ α F; 0 where every F is 0, where the merge jumps.
template <class V, class Element>
TIMM_EXT_FN V merge_fisher_slope(const Element& e, const Merge<V>& m, int t) {
  return select(m.rest > V{}, V{}, merge_offset(e, m, t) * ((V{} + 1) / m.total) * e.alpha(t) * m.scale);
}

}  // namespace timm_ext::math
