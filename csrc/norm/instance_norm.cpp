// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "norm/cpu/kernels.h"
#include "operators.h"

namespace timm_ext {
namespace {

void check_input(const char* op, const Tensor& input) {
  check_dtype(op, "input", input, ScalarType::Float, "");
  TIMM_EXT_CHECK(input.dim() >= 3, op, ": input must be [B, C, ...] (got ", list(input.sizes()), ")");
}

void check_vector(const char* op, const char* name, const Tensor& vector, int64_t size, const Tensor& input) {
  check_same_device(op, name, vector, "input", input);
  check_dtype(op, name, vector, ScalarType::Float, "");
  TIMM_EXT_CHECK(vector.numel() == size && vector.is_contiguous(), op, ": ", name, " must hold ", size,
                 " elements, contiguous, for input ", list(input.sizes()), " (got ", list(vector.sizes()), ")");
}

/// Whether the elements of each example lie side by side; examples may lie apart, as in a part of the channels.
bool has_whole_examples(const Tensor& tensor) {
  int64_t step = 1;
  for (int64_t axis = tensor.dim() - 1; axis > 0; --axis) {
    if (tensor.size(axis) != 1 && tensor.stride(axis) != step) return false;
    step *= tensor.size(axis);
  }
  return true;
}

std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> instance_norm(const Tensor& input, const std::optional<Tensor>& weight,
                                                 const std::optional<Tensor>& bias, double epsilon) {
  constexpr const char* kOp = "instance_norm";
  check_input(kOp, input);
  const int64_t channels = input.size(1), planes = input.size(0) * channels;
  if (weight) check_vector(kOp, "weight", *weight, channels, input);
  if (bias) check_vector(kOp, "bias", *bias, channels, input);

  const Tensor output = new_tensor(input, sizes_of(input));
  const Tensor mean = new_tensor(input, {planes}), rstd = new_tensor(input, {planes});
  if (planes == 0) return {output, mean, rstd};
  const Tensor x = torch::stable::contiguous(input);
  const cpu::InstanceNormProblem problem{values_of(x),    values_of(weight), values_of(bias),
                                         room_of(output), room_of(mean),     room_of(rstd),
                                         epsilon,         channels,          input.numel() / planes};
  torch::stable::parallel_for(0, planes, 1,
                              [&](int64_t first, int64_t last) { cpu::instance_norm(problem, first, last); });
  return {output, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> instance_norm_backward(const Tensor& grad, const Tensor& input, const Tensor& mean,
                                                          const Tensor& rstd, const std::optional<Tensor>& weight,
                                                          const std::optional<Tensor>& bias, double slope) {
  constexpr const char* kOp = "instance_norm_backward";
  check_input(kOp, input);
  check_same_device(kOp, "grad", grad, "input", input);
  check_dtype(kOp, "grad", grad, ScalarType::Float, "");
  TIMM_EXT_CHECK(list(grad.sizes()) == list(input.sizes()), kOp, ": grad must have the shape of input, ",
                 list(input.sizes()), " (got ", list(grad.sizes()), ")");
  const int64_t channels = input.size(1), planes = input.size(0) * channels;
  check_vector(kOp, "mean", mean, planes, input);
  check_vector(kOp, "rstd", rstd, planes, input);
  if (weight) check_vector(kOp, "weight", *weight, channels, input);
  if (bias) check_vector(kOp, "bias", *bias, channels, input);

  const Tensor below = new_tensor(input, sizes_of(input));
  const Tensor for_weight = new_tensor(input, {input.size(0), channels});
  const Tensor for_bias = new_tensor(input, {input.size(0), channels});
  if (planes == 0) return {below, for_weight, for_bias};
  const Tensor g = has_whole_examples(grad) ? grad : torch::stable::contiguous(grad);
  const Tensor x = torch::stable::contiguous(input);
  const cpu::InstanceNormGradient problem{
      values_of(g),    values_of(x),   values_of(mean),       values_of(rstd),   values_of(weight),
      values_of(bias), room_of(below), room_of(for_weight),   room_of(for_bias), static_cast<float>(slope),
      g.stride(0),     channels,       input.numel() / planes};
  torch::stable::parallel_for(0, planes, 1,
                              [&](int64_t first, int64_t last) { cpu::instance_norm_backward(problem, first, last); });
  return {below, for_weight, for_bias};
}

}  // namespace timm_ext
