// SPDX-License-Identifier: Apache-2.0
//
// Two passes over a plane, which stays in the caches between them: the sums, then the input's gradient. With
// a = w ρ (x − μ) + b, ρ = rstd, N points and d = grad · leaky'(a):
//     s = Σ d    t = Σ d (x − μ)    grad_bias = s    grad_weight = ρ t
//     grad_input = w ρ (d − s / N − ρ² (x − μ) t / N)
#include "norm/cpu/column_sums.h"
#include "norm/cpu/kernels.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int64_t kChain = 256 * kColumns;  // points that are summed in float32

class Plane {
 public:
  Plane(const InstanceNormGradient& p, int64_t plane)
      : p_(p),
        grad_(p.grad + plane / p.channels * p.grad_example + plane % p.channels * p.points),
        input_(p.input + plane * p.points),
        mean_(p.mean[plane]),
        rstd_(p.rstd[plane]),
        scale_((p.weight != nullptr ? p.weight[plane % p.channels] : 1) * rstd_),
        shift_(p.bias != nullptr ? p.bias[plane % p.channels] : 0) {}

  /// Σ d and Σ d (x − μ).
  void sum(double& plain, double& centred) const {
    plain = centred = 0;
    for (int64_t first = 0; first < p_.points; first += kChain) {
      add_chain(first, smaller_of(first + kChain, p_.points), plain, centred);
    }
  }

  void write(double plain, double centred, float* to) const {
    const double points = static_cast<double>(p_.points);
    const float constant = static_cast<float>(-scale_ * plain / points);
    const float slant = static_cast<float>(-scale_ * (double{rstd_} * rstd_) * centred / points);
    const int64_t whole = p_.points / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      const V x = math::load<V>(input_ + i) - mean_;
      math::store(to + i, scale_ * passed(x, math::load<V>(grad_ + i)) + (slant * x + constant));
    }
    for (int64_t i = whole; i < p_.points; ++i) {
      const float x = input_[i] - mean_;
      to[i] = scale_ * passed(x, grad_[i]) + (slant * x + constant);
    }
  }

 private:
  /// What comes through the activation of a centred input.
  V passed(V x, V grad) const { return math::select(scale_ * x + shift_ > 0, grad, p_.slope * grad); }
  float passed(float x, float grad) const { return grad * (scale_ * x + shift_ > 0 ? 1.0f : p_.slope); }

  void add_chain(int64_t first, int64_t last, double& plain, double& centred) const {
    V sums[2][kVectors] = {};
    int64_t i = first;
    for (; i + kColumns <= last; i += kColumns) {
      for (int v = 0; v < kVectors; ++v) {
        const V x = math::load<V>(input_ + i + v * kLanes) - mean_;
        const V d = passed(x, math::load<V>(grad_ + i + v * kLanes));
        sums[0][v] += d;
        sums[1][v] += d * x;
      }
    }
    if (i > first) {
      plain += total(sums[0]);
      centred += total(sums[1]);
    }
    for (; i < last; ++i) {
      const float x = input_[i] - mean_, d = passed(x, grad_[i]);
      plain += d;
      centred += d * x;
    }
  }

  const InstanceNormGradient& p_;
  const float* grad_;
  const float* input_;
  float mean_;
  float rstd_;
  float scale_;
  float shift_;
};

}  // namespace

void instance_norm_backward(const InstanceNormGradient& p, int64_t first_plane, int64_t last_plane) {
  for (int64_t i = first_plane; i < last_plane; ++i) {
    const Plane plane(p, i);
    double plain, centred;
    plane.sum(plain, centred);
    plane.write(plain, centred, p.grad_input + i * p.points);
    p.grad_bias[i] = static_cast<float>(plain);
    p.grad_weight[i] = static_cast<float>(centred * p.rstd[i]);
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
