// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "checks.h"
#include "cuda_launch.h"
#include "merge/cpu/kernels.h"
#include "merge/cuda/launchers.h"
#include "operators.h"

namespace timm_ext {
namespace {

using torch::stable::new_empty;
using torch::stable::parallel_for;

constexpr const char* kOp = "fused_merge";

/// Results of this size leave the caches anyway before they are read.
constexpr int64_t kStreamedBytes = int64_t{1} << 22;

/// The rows of a [T, P] matrix: unit stride along P, and rows that do not overlap.
int64_t row_stride(const char* name, const Tensor& matrix) {
  const int64_t models = matrix.size(0);
  const int64_t elements = matrix.size(1);
  const bool unit = elements <= 1 || matrix.stride(1) == 1;
  const bool apart = models <= 1 || matrix.stride(0) >= elements;
  TIMM_EXT_CHECK(unit && apart, kOp, ": ", name, " must have stride 1 along P and rows at least P apart (got strides ",
                 list(matrix.strides()), " for ", list(matrix.sizes()), ")");
  return models <= 1 ? elements : matrix.stride(0);
}

void check_offsets(const Tensor& offsets, int64_t segments, int64_t elements) {
  const int64_t* const values = static_cast<const int64_t*>(offsets.const_data_ptr());
  TIMM_EXT_CHECK(values[0] == 0 && values[segments] == elements, kOp, ": offsets must go from 0 to P = ", elements,
                 " (got ", values[0], " to ", values[segments], ")");
  for (int64_t s = 0; s < segments; ++s) {
    TIMM_EXT_CHECK(values[s] < values[s + 1], kOp, ": offsets must be strictly increasing (got ", values[s], " then ",
                   values[s + 1], " at segment ", s, ")");
  }
}

MergeInputs check_inputs(const Tensor& theta, const std::optional<Tensor>& fisher, const Tensor& log_weight,
                         const Tensor& offsets) {
  TIMM_EXT_CHECK(theta.dim() == 2 && theta.size(0) >= 1, kOp, ": theta must be [T, P] with T >= 1 (got ",
                 list(theta.sizes()), ")");
  const auto element = element_of(theta.scalar_type());
  TIMM_EXT_CHECK(element.has_value(), kOp, ": theta must be float32, bfloat16, float16 or float64 (got ",
                 dtype_name(theta.scalar_type()), ")");
  MergeInputs in{};
  in.element = *element;
  in.models = theta.size(0);
  in.elements = theta.size(1);
  in.theta = theta.const_data_ptr();
  in.theta_stride = row_stride("theta", theta);

  if (fisher.has_value()) {
    TIMM_EXT_CHECK(fisher->dim() == 2 && fisher->size(0) == in.models && fisher->size(1) == in.elements, kOp,
                   ": fisher must have the shape of theta (got ", list(fisher->sizes()), " vs ", list(theta.sizes()),
                   ")");
    check_dtype(kOp, "fisher", *fisher, theta.scalar_type(), " like theta");
    check_same_device(kOp, "fisher", *fisher, "theta", theta);
    in.fisher = fisher->const_data_ptr();
    in.fisher_stride = row_stride("fisher", *fisher);
  }

  TIMM_EXT_CHECK(offsets.dim() == 1 && offsets.size(0) >= 1 && offsets.is_contiguous(), kOp,
                 ": offsets must be [S + 1], contiguous (got ", list(offsets.sizes()), ")");
  check_dtype(kOp, "offsets", offsets, ScalarType::Long, "");
  check_same_device(kOp, "offsets", offsets, "theta", theta);
  in.segments = offsets.size(0) - 1;
  in.offsets = static_cast<const int64_t*>(offsets.const_data_ptr());
  TIMM_EXT_CHECK((in.segments == 0) == (in.elements == 0), kOp,
                 ": offsets must hold one segment or more just when P > 0 (got ", in.segments,
                 " segments for P = ", in.elements, ")");
  if (theta.is_cpu()) check_offsets(offsets, in.segments, in.elements);

  TIMM_EXT_CHECK(log_weight.dim() == 2 && log_weight.size(0) == in.segments && log_weight.size(1) == in.models, kOp,
                 ": log_weight must be [S, T] = [", in.segments, ", ", in.models, "] (got ", list(log_weight.sizes()),
                 ")");
  check_dtype(kOp, "log_weight", log_weight, arithmetic_type(theta.scalar_type()), " for matrices of this dtype");
  check_same_device(kOp, "log_weight", log_weight, "theta", theta);
  TIMM_EXT_CHECK(log_weight.is_contiguous(), kOp, ": log_weight must be contiguous (got strides ",
                 list(log_weight.strides()), ")");
  in.log_weight = log_weight.const_data_ptr();
  return in;
}

void forward(const MergeInputs& in, const Tensor& theta, const Tensor& merged) {
  if (in.elements == 0) return;
  void* const to = merged.mutable_data_ptr();
  if (theta.is_cuda()) {
    launch_on_device_of(kOp, theta, [&](void* stream) { return cuda::merge_forward(in, to, stream); });
    return;
  }
  const bool streamed = merged.numel() * merged.element_size() >= kStreamedBytes;
  parallel_for(0, cpu::block_count(in.elements), 1,
               [&](int64_t first, int64_t last) { cpu::merge_forward(in, to, streamed, first, last); });
}

/// The gradient with a stride the kernels know: 1, or 0 when one value stands for all.
Tensor usable_gradient(const Tensor& grad, const Tensor& theta) {
  TIMM_EXT_CHECK(grad.dim() == 1 && grad.size(0) == theta.size(1), kOp, ": grad must be [P] = [", theta.size(1),
                 "] (got ", list(grad.sizes()), ")");
  check_dtype(kOp, "grad", grad, theta.scalar_type(), " like theta");
  check_same_device(kOp, "grad", grad, "theta", theta);
  const bool usable = grad.numel() <= 1 || grad.stride(0) == 0 || grad.stride(0) == 1;
  return usable ? grad : torch::stable::contiguous(grad);
}

MergeGradient gradient_of(const Tensor& grad) {
  return {grad.const_data_ptr(), grad.numel() > 1 && grad.stride(0) == 0 ? 0 : 1};
}

void backward_log_weight_cpu(const MergeInputs& in, const MergeGradient& gradient, void* result) {
  const int64_t blocks = cpu::block_count(in.elements);
  std::vector<double> edges(static_cast<size_t>(blocks * 2 * in.models));
  parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    cpu::merge_backward_log_weight(in, gradient, result, edges.data(), first, last);
  });
  cpu::stitch_edges(in, edges.data(), result);
}

}  // namespace

Tensor fused_merge(const Tensor& theta, const std::optional<Tensor>& fisher, const Tensor& log_weight,
                   const Tensor& offsets) {
  const MergeInputs in = check_inputs(theta, fisher, log_weight, offsets);
  const Tensor merged = new_tensor(theta, {in.elements});
  forward(in, theta, merged);
  return merged;
}

void fused_merge_out(const Tensor& theta, const std::optional<Tensor>& fisher, const Tensor& log_weight,
                     const Tensor& offsets, const Tensor& out) {
  const MergeInputs in = check_inputs(theta, fisher, log_weight, offsets);
  TIMM_EXT_CHECK(out.dim() == 1 && out.size(0) == in.elements && out.is_contiguous(), kOp, ": out must be [P] = [",
                 in.elements, "], contiguous (got ", list(out.sizes()), " with strides ", list(out.strides()), ")");
  check_dtype(kOp, "out", out, theta.scalar_type(), " like theta");
  check_same_device(kOp, "out", out, "theta", theta);
  const bool apart = !overlap(out, theta) && !overlap(out, log_weight) && !overlap(out, offsets) &&
                     !(fisher.has_value() && overlap(out, *fisher));
  TIMM_EXT_CHECK(apart, kOp, ": out must not share memory with the inputs (got overlapping tensors)");
  forward(in, theta, out);
}

Tensor fused_merge_backward_log_weight(const Tensor& grad, const Tensor& theta, const std::optional<Tensor>& fisher,
                                       const Tensor& log_weight, const Tensor& offsets) {
  const MergeInputs in = check_inputs(theta, fisher, log_weight, offsets);
  const Tensor usable = usable_gradient(grad, theta);
  const Tensor result = new_tensor(log_weight, {in.segments, in.models});
  if (in.elements == 0) return result;
  if (!theta.is_cuda()) {
    backward_log_weight_cpu(in, gradient_of(usable), result.mutable_data_ptr());
    return result;
  }
  launch_on_device_of(kOp, theta, [&](void* stream) {
    const auto bytes = cuda::merge_backward_workspace_bytes(in.models, in.elements, in.element);
    const Tensor workspace = new_empty(theta, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
    return cuda::merge_backward_log_weight(in, gradient_of(usable), result.mutable_data_ptr(),
                                           workspace.mutable_data_ptr(), stream);
  });
  return result;
}

std::tuple<Tensor, Tensor> fused_merge_backward_matrices(const Tensor& grad, const Tensor& theta,
                                                         const std::optional<Tensor>& fisher, const Tensor& log_weight,
                                                         const Tensor& offsets, bool theta_wanted, bool fisher_wanted) {
  const MergeInputs in = check_inputs(theta, fisher, log_weight, offsets);
  TIMM_EXT_CHECK(fisher.has_value() || !fisher_wanted, kOp,
                 ": fisher must be given where its gradient is wanted (got None)");
  const Tensor usable = usable_gradient(grad, theta);
  const auto matrix = [&](bool wanted) {
    return wanted ? new_tensor(theta, {in.models, in.elements}) : new_tensor(theta, {0});
  };
  const Tensor grad_theta = matrix(theta_wanted);
  const Tensor grad_fisher = matrix(fisher_wanted);
  if (in.elements == 0) return {grad_theta, grad_fisher};
  const MergeMatrixGradients out{theta_wanted ? grad_theta.mutable_data_ptr() : nullptr,
                                 fisher_wanted ? grad_fisher.mutable_data_ptr() : nullptr, in.elements, in.elements};
  const MergeGradient gradient = gradient_of(usable);
  if (theta.is_cuda()) {
    launch_on_device_of(kOp, theta,
                        [&](void* stream) { return cuda::merge_backward_matrices(in, gradient, out, stream); });
    return {grad_theta, grad_fisher};
  }
  parallel_for(0, cpu::block_count(in.elements), 1,
               [&](int64_t first, int64_t last) { cpu::merge_backward_matrices(in, gradient, out, first, last); });
  return {grad_theta, grad_fisher};
}

}  // namespace timm_ext
