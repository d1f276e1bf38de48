// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "merge/cpu/kernels.h"
#include "operators.h"

namespace timm_ext {
namespace {

using cpu::Mixing;
using torch::stable::parallel_for;

constexpr const char* kOp = "log_weights";
constexpr int64_t kRowsPerThread = 1024;

Mixing parse(const std::string& mixing) {
  if (mixing == "sigmoid") return Mixing::kSigmoid;
  if (mixing == "softmax") return Mixing::kSoftmax;
  TIMM_EXT_CHECK(mixing == "ratios", kOp, ": mixing must be 'sigmoid', 'softmax' or 'ratios' (got '", mixing, "')");
  return Mixing::kRatios;
}

void check_logits(const Tensor& logits) {
  TIMM_EXT_CHECK(logits.dim() == 2 && logits.size(1) >= 1, kOp, ": logits must be [G, T] with T >= 1 (got ",
                 list(logits.sizes()), ")");
  const ScalarType type = logits.scalar_type();
  TIMM_EXT_CHECK(type == ScalarType::Float || type == ScalarType::Double, kOp,
                 ": logits must be float32 or float64 (got ", dtype_name(type), ")");
}

Element element(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? Element::kFloat64 : Element::kFloat32;
}

}  // namespace

Tensor log_weights(const Tensor& logits, const std::string& mixing) {
  const Mixing kind = parse(mixing);
  check_logits(logits);
  const Tensor x = torch::stable::contiguous(logits);
  const Tensor result = new_tensor(logits, {logits.size(0), logits.size(1)});
  const void* const from = x.const_data_ptr();
  void* const to = result.mutable_data_ptr();
  parallel_for(0, logits.size(0), kRowsPerThread, [&](int64_t first, int64_t last) {
    cpu::log_weights(kind, element(logits), from, to, logits.size(1), first, last);
  });
  return result;
}

Tensor log_weights_backward(const Tensor& grad, const Tensor& logits, const std::string& mixing) {
  const Mixing kind = parse(mixing);
  check_logits(logits);
  check_dtype(kOp, "grad", grad, logits.scalar_type(), " like logits");
  TIMM_EXT_CHECK(grad.dim() == 2 && grad.size(0) == logits.size(0) && grad.size(1) == logits.size(1), kOp,
                 ": grad must have the shape of logits (got ", list(grad.sizes()), " vs ", list(logits.sizes()), ")");
  const Tensor g = torch::stable::contiguous(grad);
  const Tensor x = torch::stable::contiguous(logits);
  const Tensor result = new_tensor(logits, {logits.size(0), logits.size(1)});
  const void* const grads = g.const_data_ptr();
  const void* const from = x.const_data_ptr();
  void* const to = result.mutable_data_ptr();
  parallel_for(0, logits.size(0), kRowsPerThread, [&](int64_t first, int64_t last) {
    cpu::log_weights_backward(kind, element(logits), grads, from, to, logits.size(1), first, last);
  });
  return result;
}

}  // namespace timm_ext
