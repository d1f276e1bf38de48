// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include "conv3d/arguments.h"
#include "conv3d/cpu/trilinear.h"
#include "operators.h"

namespace timm_ext {

Tensor upsample_trilinear3d(const Tensor& input) {
  check_volume("upsample_trilinear3d", "input", input, 5, input);
  const int64_t size[3] = {input.size(2), input.size(3), input.size(4)};
  const Tensor result = new_tensor(input, {input.size(0), input.size(1), 2 * size[0], 2 * size[1], 2 * size[2]});
  if (result.numel() == 0) return result;
  const Tensor x = torch::stable::contiguous(input);
  const cpu::TrilinearProblem problem{values_of(x), room_of(result), {size[0], size[1], size[2]}};
  torch::stable::parallel_for(0, result.numel() / (4 * size[1] * size[2]), 1, [&](int64_t first, int64_t last) {
    cpu::upsample_trilinear_planes(problem, first, last);
  });
  return result;
}

Tensor upsample_trilinear3d_backward(const Tensor& grad) {
  constexpr const char* kOp = "upsample_trilinear3d_backward";
  check_volume(kOp, "grad", grad, 5, grad);
  TIMM_EXT_CHECK(grad.size(2) % 2 == 0 && grad.size(3) % 2 == 0 && grad.size(4) % 2 == 0, kOp,
                 ": grad must be [B, C, 2 D, 2 H, 2 W] (got ", list(grad.sizes()), ")");
  const int64_t size[3] = {grad.size(2) / 2, grad.size(3) / 2, grad.size(4) / 2};
  const Tensor result = new_tensor(grad, {grad.size(0), grad.size(1), size[0], size[1], size[2]});
  if (result.numel() == 0) return result;
  const Tensor g = torch::stable::contiguous(grad);
  const cpu::TrilinearProblem problem{values_of(g), room_of(result), {size[0], size[1], size[2]}};
  torch::stable::parallel_for(0, result.numel() / (size[1] * size[2]), 1, [&](int64_t first, int64_t last) {
    cpu::upsample_trilinear_gradient_planes(problem, first, last);
  });
  return result;
}

}  // namespace timm_ext
