// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "conv3d_checks.h"
#include "cpu/conv_square.h"
#include "cpu/kernels.h"
#include "cuda/conv_square.h"
#include "cuda_launch.h"
#include "operators.h"

namespace timm_ext {
namespace {

using cpu::ConvLayout;
using math::ConvShape;
using torch::stable::parallel_for;

constexpr const char* kOp = "conv_weight_grad_square_";
constexpr int64_t kPackedElements = int64_t{1} << 23;  // of the examples that are packed at a time
constexpr int64_t kRowsPerThread = 16;
constexpr int64_t kPairsPerThread = 4;

/// Three numbers, of which missing leading ones are `missing`.
void set_axes(int64_t (&to)[3], const int64_t* from, int64_t axes, int64_t missing) {
  std::fill(to, to + 3, missing);
  std::copy(from, from + axes, to + 3 - axes);
}

void check_axes(const char* name, const std::vector<int64_t>& values, int64_t axes, int64_t least) {
  const bool fit = static_cast<int64_t>(values.size()) == axes &&
                   std::all_of(values.begin(), values.end(), [&](int64_t value) { return value >= least; });
  check(fit, kOp, ": ", name, " must hold ", axes, " numbers >= ", least, " (got ", list(values), ")");
}

void check_tensor(const char* name, const Tensor& tensor, const Tensor& acc) {
  check_same_device(kOp, name, tensor, "acc", acc);
  check(tensor.dim() == acc.dim(), kOp, ": ", name, " must have as many axes as acc, ", acc.dim(), " (got ",
        list(tensor.sizes()), ")");
  check(!overlap(acc, tensor), kOp, ": acc must not share memory with ", name);
}

/// float32 on the CPU; on CUDA bfloat16 and float16, too.
void check_types(const Tensor& acc, const Tensor& grad, const Tensor& input) {
  check_dtype(kOp, "acc", acc, ScalarType::Float, "");
  const ScalarType type = grad.scalar_type();
  if (acc.is_cpu()) check_dtype(kOp, "grad", grad, ScalarType::Float, " on the CPU");
  check(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, kOp,
        ": grad must be float32, bfloat16 or float16 (got ", dtype_name(type), ")");
  check_dtype(kOp, "input", input, type, " like grad");
}

/// The shape of one group, after checking that everything fits together.
ConvShape shape_of(const Tensor& acc, const Tensor& grad, const Tensor& input, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  const int64_t axes = acc.dim() - 2;
  check(groups >= 1 && acc.size(0) % groups == 0, kOp, ": groups must divide the channels of grad, ", acc.size(0),
        " (got ", groups, ")");
  check(grad.size(0) == input.size(0) && grad.size(1) == acc.size(0) && input.size(1) == acc.size(1) * groups, kOp,
        ": acc, grad and input must be [O, I / groups, ...], [B, O, ...] and [B, I, ...] (got ", list(acc.sizes()),
        ", ", list(grad.sizes()), " and ", list(input.sizes()), " in ", groups, " groups)");
  ConvShape s{acc.size(0) / groups, acc.size(1), {}, {}, {}, {}, {}, {}};
  set_axes(s.out, grad.sizes().data() + 2, axes, 1);
  set_axes(s.in, input.sizes().data() + 2, axes, 1);
  set_axes(s.kernel, acc.sizes().data() + 2, axes, 1);
  set_axes(s.stride, stride.data(), axes, 1);
  set_axes(s.padding, padding.data(), axes, 0);
  set_axes(s.dilation, dilation.data(), axes, 1);
  for (int a = 0; a < 3; ++a) {
    const int64_t reach = (s.out[a] - 1) * s.stride[a] + (s.kernel[a] - 1) * s.dilation[a] + 1;
    check(reach <= s.in[a] + 2 * s.padding[a], kOp, ": grad must have no larger sizes than the output (got ",
          list(grad.sizes()), " for input ", list(input.sizes()), ")");
  }
  return s;
}

/// One group of a convolution on the CPU.
struct Work {
  const ConvShape& shape;
  const ConvLayout& layout;
  const float* grad;  // of the group
  const float* input;
  int64_t grad_example;  // elements from one example to the next
  int64_t input_example;
  float* accumulator;
  int64_t output_step;  // of the accumulator
  int64_t input_step;
  float scale;
  float* packed;  // of as many examples as go together
  float* sums;    // over slabs

  /// The examples [first, last), packed and squared.
  void run(int64_t first, int64_t last) const {
    const cpu::ConvSquareProblem problem = problem_of(last - first, layout.grad_rows());
    for (int64_t b = 0; b < last - first; ++b) pack(first + b, problem, b, 0);
    for_units(cpu::kernels().conv_square, problem, conv_square_units(problem));
  }

  /// An example that takes several slabs.
  void run_slabs(int64_t example) const {
    std::fill_n(sums, conv_sums_elements(layout, shape), 0.0f);
    for (int64_t slab = 0; slab < layout.grad_rows(); slab += layout.slab) {
      const int64_t last = std::min(slab + layout.slab, layout.grad_rows());
      const cpu::ConvSquareProblem problem = problem_of(1, last - slab);
      pack(example, problem, 0, slab);
      for_units(cpu::kernels().conv_square_add, problem, conv_square_add_units(problem));
    }
    const cpu::ConvSquareProblem problem = problem_of(1, 0);
    for_units(cpu::kernels().conv_square_sums, problem, conv_square_units(problem));
  }

 private:
  cpu::ConvSquareProblem problem_of(int64_t examples, int64_t rows) const {
    const float* const input_packed = packed + examples * layout.grad_elements(shape);
    return {&shape, &layout, layout.taps.data(), packed,      input_packed, examples,
            rows,   sums,    accumulator,        output_step, input_step,   scale};
  }

  /// Packs the rows of an example from `slab` on.
  void pack(int64_t example, const cpu::ConvSquareProblem& problem, int64_t place, int64_t slab) const {
    const cpu::Kernels& kernels = cpu::kernels();
    const int64_t grain = layout.pairs ? kPairsPerThread : kRowsPerThread;
    const int64_t input_rows = layout.pairs ? problem.rows : layout.input_rows();
    const float *const g = grad + example * grad_example, *const x = input + example * input_example;
    float* const to_grad = packed + place * layout.grad_elements(shape);
    float* const to_input = packed + problem.examples * layout.grad_elements(shape) + place * layout.input_elements();
    parallel_for(slab, slab + problem.rows, grain, [&](int64_t begin, int64_t end) {
      pack_grad(shape, layout, kernels.conv_grad_forms, g, to_grad, slab, begin, end);
    });
    parallel_for(slab, slab + input_rows, grain, [&](int64_t begin, int64_t end) {
      pack_input(shape, layout, kernels.conv_input_forms, x, to_input, slab, begin, end);
    });
  }

  template <class Kernel>
  static void for_units(Kernel kernel, const cpu::ConvSquareProblem& problem, int64_t units) {
    parallel_for(0, units, 1, [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
  }
};

/// Exchanged: acc is [inputs, outputs, taps], its taps taken backwards.
void square_on_cpu(const ConvShape& shape, const Tensor& acc, const Tensor& grad, const Tensor& input, int64_t groups,
                   float scale, bool exchanged) {
  const ConvLayout layout(shape, torch::stable::get_num_threads(), exchanged);
  const int64_t examples = grad.size(0), taps = shape.kernel[0] * shape.kernel[1] * shape.kernel[2];
  const bool slabs = layout.group < layout.grad_rows();
  const int64_t each = layout.grad_elements(shape) + layout.input_elements();
  const int64_t at_a_time = slabs ? 1 : std::clamp<int64_t>(kPackedElements / each, 1, examples);
  const Tensor packed = torch::stable::new_empty(acc, {at_a_time * each});
  const Tensor sums = torch::stable::new_empty(acc, {slabs ? conv_sums_elements(layout, shape) : 0});
  const int64_t grad_group = grad.numel() / examples / groups, input_group = input.numel() / examples / groups;
  for (int64_t group = 0; group < groups; ++group) {
    const Work work{shape,
                    layout,
                    static_cast<const float*>(grad.const_data_ptr()) + group * grad_group,
                    static_cast<const float*>(input.const_data_ptr()) + group * input_group,
                    grad_group * groups,
                    input_group * groups,
                    static_cast<float*>(acc.mutable_data_ptr()) + group * (acc.numel() / groups),
                    exchanged ? taps : shape.inputs * taps,
                    exchanged ? shape.outputs * taps : taps,
                    scale,
                    static_cast<float*>(packed.mutable_data_ptr()),
                    static_cast<float*>(sums.mutable_data_ptr())};
    for (int64_t first = 0; first < examples; first += at_a_time) {
      slabs ? work.run_slabs(first) : work.run(first, std::min(examples, first + at_a_time));
    }
  }
}

void square_on_cuda(const ConvShape& shape, const Tensor& acc, const Tensor& grad, const Tensor& input, int64_t groups,
                    float scale) {
  launch_on_device_of(kOp, acc, [&](void* stream) {
    const cuda::ConvSquareProblem problem{grad.const_data_ptr(),
                                          input.const_data_ptr(),
                                          static_cast<float*>(acc.mutable_data_ptr()),
                                          shape,
                                          groups,
                                          grad.size(0),
                                          *element_of(grad.scalar_type()),
                                          scale};
    check(cuda::conv_square_serves(problem), kOp, ": sizes must be within 32 bits on CUDA (got ", list(grad.sizes()),
          " and ", list(input.sizes()), ")");
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
  check(acc.dim() >= 3 && acc.dim() <= 5 && acc.is_contiguous(), kOp,
        ": acc must be [O, I / groups, ...] with one to three axes, contiguous (got ", list(acc.sizes()), ")");
  check_tensor("grad", grad, acc);
  check_tensor("input", input, acc);
  check_axes("stride", stride, acc.dim() - 2, 1);
  check_axes("padding", padding, acc.dim() - 2, 0);
  check_axes("dilation", dilation, acc.dim() - 2, 1);
  const ConvShape shape = shape_of(acc, grad, input, stride, padding, dilation, groups);
  if (acc.numel() == 0 || grad.numel() == 0) return;

  const Tensor g = torch::stable::contiguous(grad), x = torch::stable::contiguous(input);
  if (acc.is_cuda()) {
    square_on_cuda(shape, acc, g, x, groups, static_cast<float>(scale));
  } else {
    square_on_cpu(shape, acc, g, x, groups, static_cast<float>(scale), false);
  }
}

void doubled_conv3d_weight_grad_square(const Tensor& acc, const Tensor& sums, const Tensor& input, double scale) {
  constexpr const char* op = "doubled_conv3d_weight_grad_square_";
  check_volume(op, "acc", acc, 5, acc);
  check_volume(op, "sums", sums, 5, acc);
  check_volume(op, "input", input, 5, acc);
  check_sums(op, sums);
  bool fit = sums.size(0) == input.size(0) && acc.size(0) == sums.size(1) && acc.size(1) == input.size(1);
  for (int a = 2; a < 5; ++a) fit &= acc.size(a) == 3 && sums.size(a) / 2 == input.size(a);
  check(fit && acc.is_contiguous(), op,
        ": acc, sums and input must be [O, I, 3, 3, 3], contiguous, [B, O, 2 D + 1, 2 H + 1, 2 W + 1] and "
        "[B, I, D, H, W] (got ",
        list(acc.sizes()), ", ", list(sums.sizes()), " and ", list(input.sizes()), ")");
  check(!overlap(acc, sums) && !overlap(acc, input), op, ": acc must not share memory with sums or input");
  if (acc.numel() == 0 || input.numel() == 0) return;
  ConvShape shape{input.size(1), acc.size(0), {}, {}, {3, 3, 3}, {2, 2, 2}, {0, 0, 0}, {1, 1, 1}};
  for (int a = 0; a < 3; ++a) shape.out[a] = input.size(a + 2), shape.in[a] = sums.size(a + 2);
  const Tensor x = torch::stable::contiguous(input), h = torch::stable::contiguous(sums);
  square_on_cpu(shape, acc, x, h, 1, static_cast<float>(scale), true);
}

}  // namespace timm_ext
