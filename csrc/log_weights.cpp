// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "math/exp.h"
#include "operators.h"

namespace timm_ext {
namespace {

constexpr const char* kOp = "log_weights";
constexpr int64_t kRowsPerThread = 1024;

enum class Mixing { kSigmoid, kSoftmax, kRatios };

Mixing parse(const std::string& mixing) {
  if (mixing == "sigmoid") return Mixing::kSigmoid;
  if (mixing == "softmax") return Mixing::kSoftmax;
  check(mixing == "ratios", kOp, ": mixing must be 'sigmoid', 'softmax' or 'ratios' (got '", mixing, "')");
  return Mixing::kRatios;
}

double log_weight(Mixing mixing, double x) {
  if (mixing == Mixing::kSoftmax) return x;
  return mixing == Mixing::kSigmoid ? math::log_sigmoid(x) : math::log_positive(x);
}

double slope(Mixing mixing, double x) {
  if (mixing == Mixing::kSoftmax) return 1.0;
  if (mixing == Mixing::kSigmoid) return math::sigmoid(-x);
  return x == 0.0 ? 0.0 : 1.0 / x;
}

template <class C>
void forward_row(Mixing mixing, const C* x, int64_t models, C* out) {
  double largest = -math::kInfinity;
  for (int64_t t = 0; t < models; ++t) {
    const double value = log_weight(mixing, x[t]);
    largest = value > largest || value != value ? value : largest;
  }
  for (int64_t t = 0; t < models; ++t) out[t] = static_cast<C>(log_weight(mixing, x[t]) - largest);
}

/// The largest entry's own gradient takes what the subtraction passes on to it, -Σ grad.
template <class C>
void backward_row(Mixing mixing, const C* grad, const C* x, int64_t models, C* out) {
  int64_t largest = 0;
  double sum = 0.0;
  for (int64_t t = 0; t < models; ++t) {
    sum += grad[t];
    if (x[t] > x[largest]) largest = t;  // every mixing is increasing
  }
  for (int64_t t = 0; t < models; ++t) {
    const double inner = static_cast<double>(grad[t]) - (t == largest ? sum : 0.0);
    out[t] = static_cast<C>(inner * slope(mixing, x[t]));
  }
}

void check_logits(const Tensor& logits) {
  check(logits.dim() == 2 && logits.size(1) >= 1, kOp, ": logits must be [G, T] with T >= 1 (got ",
        list(logits.sizes()), ")");
  const ScalarType type = logits.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double, kOp, ": logits must be float32 or float64 (got ",
        dtype_name(type), ")");
}

/// Calls f(row, zero of the dtype) for all rows, in parallel.
template <class F>
void for_each_row(const Tensor& like, const F& f) {
  torch::stable::parallel_for(0, like.size(0), kRowsPerThread, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      if (like.scalar_type() == ScalarType::Double) {
        f(row, double{});
      } else {
        f(row, float{});
      }
    }
  });
}

}  // namespace

Tensor log_weights(const Tensor& logits, const std::string& mixing) {
  const Mixing kind = parse(mixing);
  check_logits(logits);
  const Tensor x = torch::stable::contiguous(logits);
  const Tensor result = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  const int64_t models = logits.size(1);
  const void* const from = x.const_data_ptr();
  void* const to = result.mutable_data_ptr();
  for_each_row(logits, [&](int64_t row, auto zero) {
    using C = decltype(zero);
    forward_row(kind, static_cast<const C*>(from) + row * models, models, static_cast<C*>(to) + row * models);
  });
  return result;
}

Tensor log_weights_backward(const Tensor& grad, const Tensor& logits, const std::string& mixing) {
  const Mixing kind = parse(mixing);
  check_logits(logits);
  check_dtype(kOp, "grad", grad, logits.scalar_type(), " like logits");
  check(grad.dim() == 2 && grad.size(0) == logits.size(0) && grad.size(1) == logits.size(1), kOp,
        ": grad must have the shape of logits (got ", list(grad.sizes()), " vs ", list(logits.sizes()), ")");
  const Tensor g = torch::stable::contiguous(grad);
  const Tensor x = torch::stable::contiguous(logits);
  const Tensor result = torch::stable::new_empty(logits, {logits.size(0), logits.size(1)});
  const int64_t models = logits.size(1);
  const void* const grads = g.const_data_ptr();
  const void* const from = x.const_data_ptr();
  void* const to = result.mutable_data_ptr();
  for_each_row(logits, [&](int64_t row, auto zero) {
    using C = decltype(zero);
    const int64_t begin = row * models;
    backward_row(kind, static_cast<const C*>(grads) + begin, static_cast<const C*>(from) + begin, models,
                 static_cast<C*>(to) + begin);
  });
  return result;
}

}  // namespace timm_ext
