// SPDX-License-Identifier: Apache-2.0
//
// Two passes over a set of maps: the sums of each, then the input's gradient. With a = w ρ (x − μ) + b,
// ρ = 1 / sqrt(variance + epsilon), N points of the set, d = grad · leaky'(a):
//     s = Σ d    t = Σ d (x − μ)    grad_bias = s    grad_weight = ρ t    grad_slope = Σ grad min(a, 0)
//     grad_input = w ρ d − ρ Σ w s / N − ρ³ (x − μ) Σ w t / N
// where s and t are those of a map and Σ goes over the maps of the set. Of constant statistics only w ρ d is left,
// in one pass.
#include "norm/cpu/column_sums.h"
#include "norm/cpu/kernels.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int64_t kChain = 256 * kColumns;  // points that are summed in float32

struct Sums {
  double plain = 0;    // Σ d
  double centred = 0;  // Σ d (x − μ)
  double below = 0;    // Σ grad min(a, 0)
};

class Map {
 public:
  Map(const NormGradient& p, int64_t map)
      : points_(p.sets.points),
        grad_(p.grad + map / p.sets.channels * p.grad_example + map % p.sets.channels * points_),
        input_(p.input + map * points_),
        to_(p.grad_input + map * points_),
        mean_(p.mean != nullptr ? p.mean[p.sets.set_of(map)] : 0),
        rstd_(p.variance != nullptr ? inverse_deviation(p.variance[p.sets.set_of(map)], p.epsilon) : 1),
        weight_(p.weight != nullptr ? p.weight[map % p.sets.channels] : 1),
        scale_(weight_ * rstd_),
        shift_(p.bias != nullptr ? p.bias[map % p.sets.channels] : 0),
        slope_(p.slope != nullptr ? p.slope[map % p.sets.channels * p.slope_step] : 1) {}

  /// Below: also Σ grad min(a, 0). Write: also the gradient for constant statistics.
  template <bool kBelow, bool kWrite>
  Sums sum() const {
    Sums sums;
    for (int64_t first = 0; first < points_; first += kChain) {
      add_chain<kBelow, kWrite>(first, smaller_of(first + kChain, points_), sums);
    }
    return sums;
  }

  /// `plain` and `centred` are Σ w s / N and Σ w t / N of the set.
  void write(double plain, double centred) const {
    const float constant = static_cast<float>(-rstd_ * plain);
    const float slant = static_cast<float>(-rstd_ * (double{rstd_} * rstd_) * centred);
    const int64_t whole = points_ / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      const V x = math::load<V>(input_ + i) - mean_;
      math::store(to_ + i, scale_ * passed(scale_ * x + shift_, math::load<V>(grad_ + i)) + (slant * x + constant));
    }
    for (int64_t i = whole; i < points_; ++i) {
      const float x = input_[i] - mean_;
      to_[i] = scale_ * passed(scale_ * x + shift_, grad_[i]) + (slant * x + constant);
    }
  }

  float rstd() const { return rstd_; }
  float weight() const { return weight_; }

 private:
  /// What comes through the activation of a.
  V passed(V a, V grad) const { return math::select(a > 0, grad, slope_ * grad); }
  float passed(float a, float grad) const { return grad * (a > 0 ? 1.0f : slope_); }

  template <bool kBelow, bool kWrite>
  void add_chain(int64_t first, int64_t last, Sums& to) const {
    V sums[3][kVectors] = {};
    int64_t i = first;
    for (; i + kColumns <= last; i += kColumns) {
      for (int v = 0; v < kVectors; ++v) {
        const V x = math::load<V>(input_ + i + v * kLanes) - mean_, grad = math::load<V>(grad_ + i + v * kLanes);
        const V a = scale_ * x + shift_, d = passed(a, grad);
        sums[0][v] += d;
        sums[1][v] += d * x;
        if constexpr (kBelow) sums[2][v] += math::select(a > 0, V{}, grad * a);
        if constexpr (kWrite) math::store(to_ + i + v * kLanes, scale_ * d);
      }
    }
    if (i > first) {
      to.plain += total(sums[0]);
      to.centred += total(sums[1]);
      if constexpr (kBelow) to.below += total(sums[2]);
    }
    for (; i < last; ++i) {
      const float x = input_[i] - mean_, a = scale_ * x + shift_, d = passed(a, grad_[i]);
      to.plain += d;
      to.centred += d * x;
      if constexpr (kBelow) to.below += a > 0 ? 0.0f : grad_[i] * a;
      if constexpr (kWrite) to_[i] = scale_ * d;
    }
  }

  int64_t points_;
  const float* grad_;
  const float* input_;
  float* to_;
  float mean_;
  float rstd_;
  float weight_;
  float scale_;
  float shift_;
  float slope_;
};

Sums sums_of(const Map& map, bool below, bool write) {
  if (write) return below ? map.sum<true, true>() : map.sum<false, true>();
  return below ? map.sum<true, false>() : map.sum<false, false>();
}

}  // namespace

void norm_backward_sums(const NormGradient& p, int64_t first_map, int64_t last_map) {
  for (int64_t i = first_map; i < last_map; ++i) {
    const Map map(p, i);
    const Sums sums = sums_of(map, p.grad_slope != nullptr, p.constant);
    p.sums[2 * i] = map.weight() * sums.plain;
    p.sums[2 * i + 1] = map.weight() * sums.centred;
    p.grad_bias[i] = static_cast<float>(sums.plain);
    p.grad_weight[i] = static_cast<float>(sums.centred * map.rstd());
    if (p.grad_slope != nullptr) p.grad_slope[i] = static_cast<float>(sums.below);
  }
}

void norm_backward_totals(const NormGradient& p, int64_t first_set, int64_t last_set) {
  const double points = static_cast<double>(p.sets.members * p.sets.points);
  for (int64_t set = first_set; set < last_set; ++set) {
    double plain = 0, centred = 0;
    for (int64_t m = 0; m < p.sets.members; ++m) {
      plain += p.sums[2 * p.sets.map(set, m)];
      centred += p.sums[2 * p.sets.map(set, m) + 1];
    }
    p.sums[2 * p.sets.map(set, 0)] = plain / points;
    p.sums[2 * p.sets.map(set, 0) + 1] = centred / points;
  }
}

void norm_backward_write(const NormGradient& p, int64_t first_map, int64_t last_map) {
  for (int64_t i = first_map; i < last_map; ++i) {
    const double* const totals = p.sums + 2 * p.sets.map(p.sets.set_of(i), 0);
    Map(p, i).write(totals[0], totals[1]);
  }
}

void norm_backward_sets(const NormGradient& p, int64_t first_set, int64_t last_set) {
  for (int64_t set = first_set; set < last_set; ++set) {
    for (int64_t m = 0; m < p.sets.members; ++m) {
      const int64_t map = p.sets.map(set, m);
      norm_backward_sums(p, map, map + 1);
    }
    norm_backward_totals(p, set, set + 1);
    for (int64_t m = p.sets.members; m-- > 0;) {  // the latest is still in the caches
      const int64_t map = p.sets.map(set, m);
      norm_backward_write(p, map, map + 1);
    }
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
