// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include "conv3d/arguments.h"
#include "conv3d/conv_square_on_cpu.h"
#include "conv3d/cpu/kernels.h"
#include "operators.h"

namespace timm_ext {

Tensor upsample_nearest3d(const Tensor& input) {
  check_volume("upsample_nearest3d", "input", input, 5, input);
  const int64_t rows = input.size(3), columns = input.size(4);
  const Tensor result = new_tensor(input, {input.size(0), input.size(1), 2 * input.size(2), 2 * rows, 2 * columns});
  if (result.numel() == 0) return result;
  const Tensor x = torch::stable::contiguous(input);
  const cpu::UpsamplingProblem problem{values_of(x), room_of(result), rows, columns};
  torch::stable::parallel_for(0, x.numel() / (rows * columns), 1,
                              [&](int64_t first, int64_t last) { cpu::upsample_planes(problem, first, last); });
  return result;
}

Tensor neighbour_sums3d(const Tensor& input) {
  constexpr const char* op = "neighbour_sums3d";
  check_volume(op, "input", input, 5, input);
  TIMM_EXT_CHECK(input.size(2) > 0 && input.size(3) > 0 && input.size(4) > 0, op, ": input must have voxels (got ",
                 list(input.sizes()), ")");
  const int64_t planes = input.size(2) + 1;
  const Tensor result = new_tensor(input, {input.size(0), input.size(1), planes, input.size(3) + 1, input.size(4) + 1});
  if (result.numel() == 0) return result;
  const Tensor x = torch::stable::contiguous(input);
  const cpu::NeighbourSumsProblem problem{values_of(x), room_of(result), {input.size(2), input.size(3), input.size(4)}};
  torch::stable::parallel_for(0, input.size(0) * input.size(1) * planes, 1,
                              [&](int64_t first, int64_t last) { cpu::neighbour_sums(problem, first, last); });
  return result;
}

void upsampled_conv3d_weight_grad_square(const Tensor& acc, const Tensor& sums, const Tensor& input, double scale) {
  constexpr const char* op = "upsampled_conv3d_weight_grad_square_";
  check_volume(op, "acc", acc, 5, acc);
  check_volume(op, "sums", sums, 5, acc);
  check_volume(op, "input", input, 5, acc);
  check_sums(op, sums);
  bool fit = sums.size(0) == input.size(0) && acc.size(0) == sums.size(1) && acc.size(1) == input.size(1);
  for (int a = 2; a < 5; ++a) fit &= acc.size(a) == 3 && sums.size(a) / 2 == input.size(a);
  TIMM_EXT_CHECK(fit && acc.is_contiguous(), op,
                 ": acc, sums and input must be [O, I, 3, 3, 3], contiguous, [B, O, 2 D + 1, 2 H + 1, 2 W + 1] and "
                 "[B, I, D, H, W] (got ",
                 list(acc.sizes()), ", ", list(sums.sizes()), " and ", list(input.sizes()), ")");
  TIMM_EXT_CHECK(!overlap(acc, sums) && !overlap(acc, input), op, ": acc must not share memory with sums or input");
  if (acc.numel() == 0 || input.numel() == 0) return;
  ConvShape shape{input.size(1), acc.size(0), {}, {}, {3, 3, 3}, {2, 2, 2}, {0, 0, 0}, {1, 1, 1}};
  for (int a = 0; a < 3; ++a) shape.out[a] = input.size(a + 2), shape.in[a] = sums.size(a + 2);
  const Tensor x = torch::stable::contiguous(input), h = torch::stable::contiguous(sums);
  square_on_cpu(shape, acc, x, h, 1, static_cast<float>(scale), true);
}

}  // namespace timm_ext
