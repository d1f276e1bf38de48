// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "conv3d/arguments.h"
#include "conv3d/conv_square_on_cpu.h"
#include "conv3d/cuda/conv_square.h"
#include "cuda_launch.h"
#include "operators.h"

namespace timm_ext {
namespace {

constexpr const char* kOp = "conv_weight_grad_square_";

/// Three numbers, of which missing leading ones are `missing`.
void set_axes(int64_t (&to)[3], const int64_t* from, int64_t axes, int64_t missing) {
  std::fill(to, to + 3, missing);
  std::copy(from, from + axes, to + 3 - axes);
}

void check_tensor(const char* name, const Tensor& tensor, const Tensor& acc) {
  check_same_device(kOp, name, tensor, "acc", acc);
  TIMM_EXT_CHECK(tensor.dim() == acc.dim(), kOp, ": ", name, " must have as many axes as acc, ", acc.dim(), " (got ",
                 list(tensor.sizes()), ")");
  check_sizes(kOp, name, tensor);
  TIMM_EXT_CHECK(!overlap(acc, tensor), kOp, ": acc must not share memory with ", name);
}

/// float32 on the CPU; on CUDA bfloat16 and float16, too.
void check_types(const Tensor& acc, const Tensor& grad, const Tensor& input) {
  check_dtype(kOp, "acc", acc, ScalarType::Float, "");
  const ScalarType type = grad.scalar_type();
  if (acc.is_cpu()) check_dtype(kOp, "grad", grad, ScalarType::Float, " on the CPU");
  TIMM_EXT_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, kOp,
                 ": grad must be float32, bfloat16 or float16 (got ", dtype_name(type), ")");
  check_dtype(kOp, "input", input, type, " like grad");
}

/// The shape of one group, after checking that everything fits together.
ConvShape shape_of(const Tensor& acc, const Tensor& grad, const Tensor& input, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  const int64_t axes = acc.dim() - 2;
  TIMM_EXT_CHECK(groups >= 1 && groups <= kLargestNumber && acc.size(0) % groups == 0, kOp,
                 ": groups must divide the channels of grad, ", acc.size(0), " (got ", groups, ")");
  TIMM_EXT_CHECK(grad.size(0) == input.size(0) && grad.size(1) == acc.size(0) && input.size(1) == acc.size(1) * groups,
                 kOp, ": acc, grad and input must be [O, I / groups, ...], [B, O, ...] and [B, I, ...] (got ",
                 list(acc.sizes()), ", ", list(grad.sizes()), " and ", list(input.sizes()), " in ", groups, " groups)");
  ConvShape s{acc.size(0) / groups, acc.size(1), {}, {}, {}, {}, {}, {}};
  set_axes(s.out, grad.sizes().data() + 2, axes, 1);
  set_axes(s.in, input.sizes().data() + 2, axes, 1);
  set_axes(s.kernel, acc.sizes().data() + 2, axes, 1);
  set_axes(s.stride, stride.data(), axes, 1);
  set_axes(s.padding, padding.data(), axes, 0);
  set_axes(s.dilation, dilation.data(), axes, 1);
  for (int a = 0; a < 3; ++a) {
    TIMM_EXT_CHECK((s.out[a] - 1) * s.stride[a] + kernel_reach(s, a) <= padded_size(s, a), kOp,
                   ": grad must have no larger sizes than the output (got ", list(grad.sizes()), " for input ",
                   list(input.sizes()), ")");
  }
  check_padded(kOp, s, grad.size(0));
  return s;
}

void square_on_cuda(const ConvShape& shape, const Tensor& acc, const Tensor& grad, const Tensor& input, int64_t groups,
                    float scale) {
  launch_on_device_of(kOp, acc, [&](void* stream) {
    const cuda::ConvSquareProblem problem{
        grad.const_data_ptr(), input.const_data_ptr(),          room_of(acc), shape, groups,
        grad.size(0),          *element_of(grad.scalar_type()), scale};
    TIMM_EXT_CHECK(cuda::conv_square_serves(problem), kOp, ": sizes must be within 32 bits on CUDA (got ",
                   list(grad.sizes()), " and ", list(input.sizes()), ")");
    const auto floats = static_cast<int64_t>(cuda::conv_square_workspace_bytes(problem) / sizeof(float));
    const Tensor workspace = torch::stable::new_empty(acc, {floats});
    return cuda::conv_square(problem, workspace.mutable_data_ptr(), stream);
  });
}

}  // namespace

void conv_weight_grad_square(const Tensor& acc, const Tensor& grad, const Tensor& input, std::vector<int64_t> stride,
                             std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                             double scale) {
  check_types(acc, grad, input);
  TIMM_EXT_CHECK(acc.dim() >= 3 && acc.dim() <= 5 && acc.is_contiguous(), kOp,
                 ": acc must be [O, I / groups, ...] with one to three axes, contiguous (got ", list(acc.sizes()), ")");
  check_sizes(kOp, "acc", acc);
  check_tensor("grad", grad, acc);
  check_tensor("input", input, acc);
  check_numbers(kOp, "stride", stride, acc.dim() - 2, 1);
  check_numbers(kOp, "padding", padding, acc.dim() - 2, 0);
  check_numbers(kOp, "dilation", dilation, acc.dim() - 2, 1);
  const ConvShape shape = shape_of(acc, grad, input, stride, padding, dilation, groups);
  if (acc.numel() == 0 || grad.numel() == 0) return;

  const Tensor g = torch::stable::contiguous(grad), x = torch::stable::contiguous(input);
  if (acc.is_cuda()) {
    square_on_cuda(shape, acc, g, x, groups, static_cast<float>(scale));
  } else {
    square_on_cpu(shape, acc, g, x, groups, static_cast<float>(scale), false);
  }
}

}  // namespace timm_ext
