// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include <string>
#include <vector>

#include "checks.h"
#include "norm/cpu/kernels.h"
#include "norm/norm_checks.h"
#include "operators.h"

namespace timm_ext {
namespace {

void check_input(const char* op, const Tensor& input) {
  check_dtype(op, "input", input, ScalarType::Float, "");
  TIMM_EXT_CHECK(input.dim() >= 3, op, ": input must be [B, C, ...] (got ", list(input.sizes()), ")");
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

int64_t points_of(const Tensor& input) {
  int64_t points = 1;
  for (int64_t axis = 2; axis < input.dim(); ++axis) points *= input.size(axis);
  return points;
}

/// A set for each channel, of all examples.
cpu::NormSets sets_of_batch(const Tensor& input) {
  const int64_t channels = input.size(1);
  return {channels, input.size(0), channels, 1, channels, points_of(input)};
}

/// By sets where these are many: a set may stay in the caches. The bits are the same.
bool goes_by_sets(const cpu::NormSets& sets) { return sets.count >= 16; }

std::tuple<Tensor, Tensor, Tensor> normalised(const char* op, const Tensor& input, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias, double epsilon,
                                              const cpu::NormSets& sets) {
  if (weight) check_vector(op, "weight", *weight, sets.channels, input);
  if (bias) check_vector(op, "bias", *bias, sets.channels, input);
  const Tensor output = new_tensor(input, sizes_of(input));
  const Tensor mean = new_tensor(input, {sets.count}), variance = new_tensor(input, {sets.count});
  if (input.numel() == 0) return {output, mean, variance};
  const Tensor x = torch::stable::contiguous(input);
  const int64_t maps = sets.count * sets.members;
  std::vector<double> moments(2 * maps);
  const cpu::NormProblem problem{values_of(x),    values_of(weight), values_of(bias),
                                 room_of(output), room_of(mean),     room_of(variance),
                                 moments.data(),  epsilon,           sets};
  const auto each = [&](const auto& kernel, int64_t count) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) { kernel(problem, first, last); });
  };
  if (goes_by_sets(sets)) {
    each(cpu::normalise_sets, sets.count);
  } else {
    each(cpu::norm_moments, maps);
    cpu::norm_statistics(problem, 0, sets.count);
    each(cpu::norm_write, maps);
  }
  return {output, mean, variance};
}

/// The sets that `over` means, by the number of means.
cpu::NormSets sets_of_statistics(const char* op, const Tensor& input, const std::optional<Tensor>& mean,
                                 const std::string& over) {
  const int64_t channels = input.size(1), batch = input.size(0);
  if (over == "batch" || over == "nothing") return sets_of_batch(input);
  TIMM_EXT_CHECK(over == "groups", op, ": over must be groups, batch or nothing (got ", over, ")");
  TIMM_EXT_CHECK(mean.has_value(), op, ": mean must be given where it is that of groups (got None)");
  return sets_of_groups(batch, groups_of_mean(op, *mean, input, channels), channels, points_of(input));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> group_norm(const Tensor& input, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias, int64_t groups, double epsilon) {
  constexpr const char* kOp = "group_norm";
  check_input(kOp, input);
  check_groups(kOp, groups, input.size(1));
  return normalised(kOp, input, weight, bias, epsilon,
                    sets_of_groups(input.size(0), groups, input.size(1), points_of(input)));
}

std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& input, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias, double epsilon) {
  constexpr const char* kOp = "batch_norm";
  check_input(kOp, input);
  return normalised(kOp, input, weight, bias, epsilon, sets_of_batch(input));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(
    const Tensor& grad, const Tensor& input, const std::optional<Tensor>& mean, const std::optional<Tensor>& variance,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& slope,
    double epsilon, const std::string& over, bool slope_wanted) {
  constexpr const char* kOp = "norm_backward";
  check_input(kOp, input);
  check_same_device(kOp, "grad", grad, "input", input);
  check_dtype(kOp, "grad", grad, ScalarType::Float, "");
  TIMM_EXT_CHECK(list(grad.sizes()) == list(input.sizes()), kOp, ": grad must have the shape of input, ",
                 list(input.sizes()), " (got ", list(grad.sizes()), ")");
  const cpu::NormSets sets = sets_of_statistics(kOp, input, mean, over);
  if (mean) check_vector(kOp, "mean", *mean, sets.count, input);
  if (variance) check_vector(kOp, "variance", *variance, sets.count, input);
  if (weight) check_vector(kOp, "weight", *weight, sets.channels, input);
  if (bias) check_vector(kOp, "bias", *bias, sets.channels, input);
  if (slope) check_vector(kOp, "slope", *slope, slope->numel() == 1 ? 1 : sets.channels, input);

  const std::vector<int64_t> rows{input.size(0), sets.channels};
  const Tensor below = new_tensor(input, sizes_of(input));
  const Tensor for_weight = new_tensor(input, rows), for_bias = new_tensor(input, rows);
  const Tensor for_slope = new_tensor(input, slope_wanted ? rows : std::vector<int64_t>{0});
  const int64_t maps = rows[0] * rows[1];
  if (maps == 0) return {below, for_weight, for_bias, for_slope};
  const Tensor g = has_whole_examples(grad) ? grad : torch::stable::contiguous(grad);
  const Tensor x = torch::stable::contiguous(input);
  std::vector<double> sums(2 * maps);
  const cpu::NormGradient problem{values_of(g),
                                  values_of(x),
                                  values_of(mean),
                                  values_of(variance),
                                  values_of(weight),
                                  values_of(bias),
                                  values_of(slope),
                                  room_of(below),
                                  room_of(for_weight),
                                  room_of(for_bias),
                                  slope_wanted ? room_of(for_slope) : nullptr,
                                  sums.data(),
                                  epsilon,
                                  slope && slope->numel() > 1,
                                  g.stride(0),
                                  over == "nothing",
                                  sets};
  const auto each = [&](const auto& kernel, int64_t count) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) { kernel(problem, first, last); });
  };
  if (problem.constant) {
    each(cpu::norm_backward_sums, maps);
  } else if (goes_by_sets(sets)) {
    each(cpu::norm_backward_sets, sets.count);
  } else {
    each(cpu::norm_backward_sums, maps);
    cpu::norm_backward_totals(problem, 0, sets.count);
    each(cpu::norm_backward_write, maps);
  }
  return {below, for_weight, for_bias, for_slope};
}

}  // namespace timm_ext
