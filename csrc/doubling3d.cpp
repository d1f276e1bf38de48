// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include "conv3d_checks.h"
#include "cpu/kernels.h"
#include "operators.h"
#include "results.h"

namespace timm_ext {

Tensor nearest_doubling3d(const Tensor& input) {
  check_volume("nearest_doubling3d", "input", input, 5, input);
  const int64_t rows = input.size(3), columns = input.size(4);
  const Tensor result = new_result(input, {input.size(0), input.size(1), 2 * input.size(2), 2 * rows, 2 * columns});
  if (result.numel() == 0) return result;
  const Tensor x = torch::stable::contiguous(input);
  const cpu::DoublingProblem problem{static_cast<const float*>(x.const_data_ptr()),
                                     static_cast<float*>(result.mutable_data_ptr()), rows, columns};
  torch::stable::parallel_for(0, x.numel() / (rows * columns), 1,
                              [&](int64_t first, int64_t last) { cpu::kernels().double_planes(problem, first, last); });
  return result;
}

Tensor neighbour_sums3d(const Tensor& input) {
  constexpr const char* op = "neighbour_sums3d";
  check_volume(op, "input", input, 5, input);
  check(input.size(2) > 0 && input.size(3) > 0 && input.size(4) > 0, op, ": input must have voxels (got ",
        list(input.sizes()), ")");
  const int64_t planes = input.size(2) + 1;
  const Tensor result = new_result(input, {input.size(0), input.size(1), planes, input.size(3) + 1, input.size(4) + 1});
  if (result.numel() == 0) return result;
  const Tensor x = torch::stable::contiguous(input);
  const cpu::NeighbourSumsProblem problem{static_cast<const float*>(x.const_data_ptr()),
                                          static_cast<float*>(result.mutable_data_ptr()),
                                          {input.size(2), input.size(3), input.size(4)}};
  torch::stable::parallel_for(0, input.size(0) * input.size(1) * planes, 1, [&](int64_t first, int64_t last) {
    cpu::kernels().neighbour_sums(problem, first, last);
  });
  return result;
}

}  // namespace timm_ext
