// SPDX-License-Identifier: Apache-2.0
//
// Labels drawn from a network's own prediction and the gradient of their log-likelihood, for one element or a vector.
#pragma once

#include "math/exp.h"
#include "math/philox.h"

namespace timm_ext::math {

TIMM_EXT_FN float exp_of(float x) { return exp_nonpositive_float(x); }
TIMM_EXT_FN double exp_of(double x) { return exp_nonpositive(x); }
#if !defined(__CUDACC__)
TIMM_EXT_FN FloatV exp_of(FloatV x) { return exp_nonpositive_float(x); }
TIMM_EXT_FN DoubleV exp_of(DoubleV x) { return exp_nonpositive(x); }
#endif

template <class V>
struct Draw {
  V label;
  V score;
};

/// A Bernoulli variable with logit z: 1 where uniform < σ(z); its score is label - σ(z), which is σ(-z) or -σ(z).
template <class V>
TIMM_EXT_FN Draw<V> bernoulli(V z, V uniform) {
  const auto negative = z < V{};
  const V tail = exp_of(select(negative, z, -z));
  const V larger_part = (V{} + 1) / (tail + 1), smaller_part = tail / (tail + 1);
  const V p = select(negative, smaller_part, larger_part);
  const V q = select(negative, larger_part, smaller_part);
  const auto drawn = uniform < p;
  return {select(drawn, V{} + 1, V{}), select(drawn, q, -p)};
}

/// A categorical variable by inversion: class k with cumulative weights c_k <= uniform · total < c_{k+1}. Call `next`
/// for each class in order.
template <class V>
class Categorical {
 public:
  TIMM_EXT_FN Categorical(V uniform, V total) : target_(uniform * total), total_(total), inverse_((V{} + 1) / total) {}

  /// The score 1[label = k] - weight / total of the next class; the last one takes what rounding leaves over.
  TIMM_EXT_FN V next(V weight, bool last) {
    const V end = reached_ + weight;
    const V past = last ? target_ + 1 : end;
    const auto above = reached_ <= target_, below = target_ < past;
    label_ = select(above, select(below, V{} + class_, label_), label_);
    const V others = (total_ - weight) * inverse_, share = -weight * inverse_;
    reached_ = end;
    class_ += 1;
    return select(above, select(below, others, share), share);
  }

  TIMM_EXT_FN V label() const { return label_; }

 private:
  V target_, total_, inverse_;
  V reached_ = {}, label_ = {};
  float class_ = 0;
};

}  // namespace timm_ext::math
