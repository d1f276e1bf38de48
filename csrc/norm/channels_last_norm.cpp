// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "checks.h"
#include "norm/cpu/channels_last.h"
#include "norm/norm_checks.h"
#include "operators.h"

namespace timm_ext {
namespace {

using math::BFloat16;

void check_volume(const char* op, const char* name, const Tensor& volume) {
  check_dtype(op, name, volume, ScalarType::BFloat16, "");
  TIMM_EXT_CHECK(volume.dim() == 3 && volume.is_contiguous(), op, ": ", name,
                 " must be [B, points, C], contiguous (got ", list(volume.sizes()), ")");
}

void check_affine(const char* op, const Tensor& input, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias) {
  if (weight) check_vector(op, "weight", *weight, input.size(2), input);
  if (bias) check_vector(op, "bias", *bias, input.size(2), input);
}

Tensor float32(const Tensor& like, std::vector<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

const BFloat16* elements_of(const Tensor& volume) { return static_cast<const BFloat16*>(volume.const_data_ptr()); }

BFloat16* room_for(const Tensor& volume) { return static_cast<BFloat16*>(volume.mutable_data_ptr()); }

template <class Kernel, class Problem>
void each(const Kernel& kernel, const Problem& problem, int64_t count) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) { kernel(problem, first, last); });
}

}  // namespace

Tensor channels_last_sums(const Tensor& input) {
  check_volume("channels_last_sums", "input", input);
  const int64_t batch = input.size(0), points = input.size(1), channels = input.size(2);
  Tensor sums = float32(input, {batch, channels});
  if (input.numel() == 0) return torch::stable::zero_(sums);
  const cpu::Chunks chunks = cpu::chunks_of(channels, points);
  std::vector<double> parts(batch * chunks.count * channels);
  const cpu::ChannelsLastSums problem{elements_of(input), room_of(sums), parts.data(), chunks};
  each(cpu::channels_last_chunk_sums, problem, batch * chunks.count);
  each(cpu::channels_last_total_sums, problem, batch);
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> channels_last_norm(const Tensor& input, const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& bias, int64_t groups,
                                                      double epsilon) {
  constexpr const char* kOp = "channels_last_norm";
  check_volume(kOp, "input", input);
  check_groups(kOp, groups, input.size(2));
  check_affine(kOp, input, weight, bias);
  const cpu::NormSets sets = sets_of_groups(input.size(0), groups, input.size(2), input.size(1));
  const Tensor output = new_tensor(input, sizes_of(input));
  const Tensor mean = float32(input, {sets.count}), variance = float32(input, {sets.count});
  if (input.numel() == 0) return {output, mean, variance};
  const cpu::Chunks chunks = cpu::chunks_of(sets.channels, sets.points);
  const int64_t batch = input.size(0), count = batch * chunks.count;
  std::vector<double> moments(2 * batch * sets.channels), parts(2 * count * sets.channels);
  const cpu::NormProblem norm{nullptr,           values_of(weight), values_of(bias), nullptr, room_of(mean),
                              room_of(variance), moments.data(),    epsilon,         sets};
  const cpu::ChannelsLastProblem problem{norm, elements_of(input), room_for(output), parts.data(), chunks};
  each(cpu::channels_last_moments, problem, count);
  each(cpu::channels_last_join, problem, batch);
  cpu::norm_statistics(norm, 0, sets.count);
  each(cpu::channels_last_write, problem, count);
  return {output, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor> channels_last_norm_backward(const Tensor& grad, const Tensor& input,
                                                               const Tensor& mean, const Tensor& variance,
                                                               const std::optional<Tensor>& weight,
                                                               const std::optional<Tensor>& bias, double slope,
                                                               double epsilon) {
  constexpr const char* kOp = "channels_last_norm_backward";
  check_volume(kOp, "input", input);
  check_same_device(kOp, "grad", grad, "input", input);
  check_volume(kOp, "grad", grad);
  TIMM_EXT_CHECK(list(grad.sizes()) == list(input.sizes()), kOp, ": grad must have the shape of input, ",
                 list(input.sizes()), " (got ", list(grad.sizes()), ")");
  check_affine(kOp, input, weight, bias);
  const int64_t batch = input.size(0), channels = input.size(2);
  const int64_t groups = groups_of_mean(kOp, mean, input, channels);
  const cpu::NormSets sets = sets_of_groups(input.size(0), groups, input.size(2), input.size(1));
  check_vector(kOp, "mean", mean, sets.count, input);
  check_vector(kOp, "variance", variance, sets.count, input);

  const Tensor below = new_tensor(input, sizes_of(input));
  const Tensor for_weight = float32(input, {batch, channels}), for_bias = float32(input, {batch, channels});
  if (input.numel() == 0) {
    torch::stable::zero_(const_cast<Tensor&>(for_weight));
    torch::stable::zero_(const_cast<Tensor&>(for_bias));
    return {below, for_weight, for_bias};
  }
  const cpu::Chunks chunks = cpu::chunks_of(channels, sets.points);
  const int64_t count = batch * chunks.count;
  std::vector<double> sums(2 * batch * channels), parts(2 * count * channels);
  cpu::NormGradient norm{};
  norm.mean = values_of(mean);
  norm.variance = values_of(variance);
  norm.weight = values_of(weight);
  norm.bias = values_of(bias);
  norm.grad_weight = room_of(for_weight);
  norm.grad_bias = room_of(for_bias);
  norm.sums = sums.data();
  norm.epsilon = epsilon;
  norm.sets = sets;
  const cpu::ChannelsLastGradient problem{
      norm, elements_of(grad), elements_of(input), room_for(below), static_cast<float>(slope), parts.data(), chunks};
  each(cpu::channels_last_backward_sums, problem, count);
  each(cpu::channels_last_backward_join, problem, batch);
  cpu::norm_backward_totals(norm, 0, sets.count);
  each(cpu::channels_last_backward_write, problem, count);
  return {below, for_weight, for_bias};
}

}  // namespace timm_ext
