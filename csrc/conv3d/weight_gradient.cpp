// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "conv3d/arguments.h"
#include "conv3d/conv_square_on_cpu.h"
#include "operators.h"

namespace timm_ext {
namespace {

constexpr const char* kOp = "conv3d_weight_gradient";
constexpr int64_t kFilledTogether = 1 << 16;

/// The shape of one group, after checking that everything fits together.
ConvShape shape_of(const Tensor& grad, const Tensor& input, const std::vector<int64_t>& kernel,
                   const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, int64_t groups) {
  TIMM_EXT_CHECK(grad.size(0) == input.size(0), kOp, ": grad and input must be [B, O, ...] and [B, I, ...] (got ",
                 list(grad.sizes()), " and ", list(input.sizes()), ")");
  TIMM_EXT_CHECK(groups >= 1 && grad.size(1) % groups == 0 && input.size(1) % groups == 0, kOp,
                 ": groups must divide the channels of grad and input, ", grad.size(1), " and ", input.size(1),
                 " (got ", groups, ")");
  ConvShape s{grad.size(1) / groups, input.size(1) / groups, {}, {}, {}, {}, {}, {}};
  for (int a = 0; a < 3; ++a) {
    s.out[a] = grad.size(a + 2);
    s.in[a] = input.size(a + 2);
    s.kernel[a] = kernel[a];
    s.stride[a] = stride[a];
    s.padding[a] = padding[a];
    s.dilation[a] = dilation[a];
    TIMM_EXT_CHECK((s.out[a] - 1) * s.stride[a] + kernel_reach(s, a) <= padded_size(s, a), kOp,
                   ": grad must have no larger sizes than the output (got ", list(grad.sizes()), " for input ",
                   list(input.sizes()), ")");
  }
  check_padded(kOp, s, grad.size(0));
  return s;
}

}  // namespace

Tensor conv3d_weight_gradient(const Tensor& grad, const Tensor& input, std::vector<int64_t> kernel,
                              std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                              int64_t groups) {
  check_stored_volume(kOp, "input", input);
  check_same_device(kOp, "grad", grad, "input", input);
  check_dtype(kOp, "grad", grad, input.scalar_type(), " like input");
  check_axes(kOp, "grad", grad, 5);
  check_numbers(kOp, "kernel", kernel, 3, 1);
  check_numbers(kOp, "stride", stride, 3, 1);
  check_numbers(kOp, "padding", padding, 3, 0);
  check_numbers(kOp, "dilation", dilation, 3, 1);
  const ConvShape shape = shape_of(grad, input, kernel, stride, padding, dilation, groups);
  const std::vector<int64_t> sizes = {grad.size(1), shape.inputs, kernel[0], kernel[1], kernel[2]};
  const Tensor result = torch::stable::new_empty(input, sizes, ScalarType::Float);
  if (result.numel() == 0) return result;
  torch::stable::parallel_for(0, result.numel(), kFilledTogether, [&](int64_t first, int64_t last) {
    std::fill(room_of(result) + first, room_of(result) + last, 0.0f);
  });
  if (grad.numel() == 0) return result;
  const Tensor g = torch::stable::contiguous(grad), x = torch::stable::contiguous(input);
  square_on_cpu(shape, result, g, x, groups, 1.0f, false, false);
  return result;
}

}  // namespace timm_ext
