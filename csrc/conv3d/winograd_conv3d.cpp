// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "conv3d/arguments.h"
#include "conv3d/cpu/kernels.h"
#include "operators.h"

namespace timm_ext {
namespace {

using torch::stable::parallel_for;

constexpr const char* kOp = "winograd_conv3d";

/// The shape of the convolution; a mirrored weight is [inputs, outputs, 1 or R, R, K].
ConvShape shape_of(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& padding, bool mirrored) {
  const int64_t rows = weight.size(3);
  TIMM_EXT_CHECK(weight.size(mirrored ? 0 : 1) == input.size(1) && (weight.size(2) == 1 || weight.size(2) == rows) &&
                     (rows == 3 || rows == 5) && weight.size(4) >= 1,
                 kOp, ": weight must be ", mirrored ? "[" : "[O, ", input.size(1), mirrored ? ", O" : "",
                 ", 1 or R, R, K] with R = 3 or 5", mirrored ? ", mirrored," : "", " for input ", list(input.sizes()),
                 " (got ", list(weight.sizes()), ")");
  check_numbers(kOp, "padding", padding, 3, 0);
  ConvShape s{weight.size(mirrored ? 1 : 0), input.size(1), {}, {}, {}, {1, 1, 1}, {}, {1, 1, 1}};
  for (int a = 0; a < 3; ++a) {
    s.in[a] = input.size(a + 2);
    s.kernel[a] = weight.size(a + 2);
    s.padding[a] = padding[a];
    s.out[a] = padded_size(s, a) - kernel_reach(s, a) + 1;
    TIMM_EXT_CHECK(s.in[a] >= 1 && s.out[a] >= 1, kOp,
                   ": input with its padding must be at least as large as the kernel (got ", list(input.sizes()),
                   " with padding ", list(padding), " for a kernel ", list(weight.sizes()), ")");
  }
  check_padded(kOp, s, input.size(0));
  return s;
}

}  // namespace

Tensor winograd_conv3d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       std::vector<int64_t> padding, bool mirrored) {
  check_volume(kOp, "input", input, 5, input);
  check_volume(kOp, "weight", weight, 5, input);
  const ConvShape shape = shape_of(input, weight, padding, mirrored);
  check_bias(kOp, bias, shape.outputs, input);
  const Tensor result = new_tensor(input, {input.size(0), shape.outputs, shape.out[0], shape.out[1], shape.out[2]});
  if (result.numel() == 0) return result;
  if (shape.inputs == 0) {
    write_bias(result, bias);
    return result;
  }

  const Tensor x = torch::stable::contiguous(input), g = torch::stable::contiguous(weight);
  const int64_t blocks = cpu::winograd_blocks(shape);
  const Tensor forms = new_tensor(x, {blocks * cpu::winograd_block_elements(shape)});
  auto* const to = room_of(forms);
  const int64_t taps = shape.kernel[0] * shape.kernel[1] * shape.kernel[2];
  const cpu::WinogradWeights weights{
      &shape, values_of(g), mirrored ? taps : shape.inputs * taps, mirrored ? shape.outputs * taps : taps, mirrored,
      to};
  parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) { cpu::winograd_weights(weights, first, last); });
  const bool streamed = result.numel() >= cpu::kWinogradStreamed;
  const cpu::WinogradProblem problem{&shape, values_of(x), to, values_of(bias), room_of(result), x.size(0), streamed};
  parallel_for(0, cpu::WinogradUnits(problem).count(), 1,
               [&](int64_t first, int64_t last) { cpu::winograd_conv(problem, first, last); });
  return result;
}

}  // namespace timm_ext
