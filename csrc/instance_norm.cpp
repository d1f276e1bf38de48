// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cpu/kernels.h"
#include "operators.h"
#include "results.h"

namespace timm_ext {
namespace {

constexpr const char* kOp = "instance_norm_backward";

void check_vector(const char* name, const Tensor& vector, int64_t size, const Tensor& input) {
  check_same_device(kOp, name, vector, "input", input);
  check_dtype(kOp, name, vector, ScalarType::Float, "");
  check(vector.numel() == size && vector.is_contiguous(), kOp, ": ", name, " must hold ", size,
        " elements, contiguous, for input ", list(input.sizes()), " (got ", list(vector.sizes()), ")");
}

const float* data_of(const std::optional<Tensor>& vector) {
  return vector ? static_cast<const float*>(vector->const_data_ptr()) : nullptr;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> instance_norm_backward(const Tensor& grad, const Tensor& input, const Tensor& mean,
                                                          const Tensor& deviation, const std::optional<Tensor>& weight,
                                                          const std::optional<Tensor>& bias, double slope) {
  check_dtype(kOp, "input", input, ScalarType::Float, "");
  check(input.dim() >= 3, kOp, ": input must be [B, C, ...] (got ", list(input.sizes()), ")");
  check_same_device(kOp, "grad", grad, "input", input);
  check_dtype(kOp, "grad", grad, ScalarType::Float, "");
  check(list(grad.sizes()) == list(input.sizes()), kOp, ": grad must have the shape of input, ", list(input.sizes()),
        " (got ", list(grad.sizes()), ")");
  const int64_t channels = input.size(1), planes = input.size(0) * channels;
  check_vector("mean", mean, planes, input);
  check_vector("deviation", deviation, planes, input);
  if (weight) check_vector("weight", *weight, channels, input);
  if (bias) check_vector("bias", *bias, channels, input);

  const Tensor below = new_result(input, {input.sizes().begin(), input.sizes().end()});
  const Tensor for_weight = new_result(input, {input.size(0), channels});
  const Tensor for_bias = new_result(input, {input.size(0), channels});
  if (planes == 0) return {below, for_weight, for_bias};
  const Tensor g = torch::stable::contiguous(grad), x = torch::stable::contiguous(input);
  const cpu::InstanceNormProblem problem{static_cast<const float*>(g.const_data_ptr()),
                                         static_cast<const float*>(x.const_data_ptr()),
                                         static_cast<const float*>(mean.const_data_ptr()),
                                         static_cast<const float*>(deviation.const_data_ptr()),
                                         data_of(weight),
                                         data_of(bias),
                                         static_cast<float*>(below.mutable_data_ptr()),
                                         static_cast<float*>(for_weight.mutable_data_ptr()),
                                         static_cast<float*>(for_bias.mutable_data_ptr()),
                                         static_cast<float>(slope),
                                         channels,
                                         input.numel() / planes};
  torch::stable::parallel_for(
      0, planes, 1, [&](int64_t first, int64_t last) { cpu::kernels().instance_norm_backward(problem, first, last); });
  return {below, for_weight, for_bias};
}

}  // namespace timm_ext
