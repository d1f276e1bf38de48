// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <vector>

#include "conv3d/arguments.h"
#include "conv3d/cpu/kernels.h"
#include "conv3d/depthwise.h"
#include "operators.h"

namespace timm_ext {
namespace {

using torch::stable::parallel_for;

/// Stride, padding and dilation, one number for each axis.
struct Around {
  const std::vector<int64_t>& stride;
  const std::vector<int64_t>& padding;
  const std::vector<int64_t>& dilation;
};

void check_arguments(const char* op, const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Around& around) {
  check_volume(op, "input", input, 5, input);
  check_volume(op, "weight", weight, 5, input);
  const bool has_taps = weight.size(2) > 0 && weight.size(3) > 0 && weight.size(4) > 0;
  TIMM_EXT_CHECK(weight.size(0) == input.size(1) && weight.size(1) == 1 && has_taps, op, ": weight must be [",
                 input.size(1), ", 1, ...] for input ", list(input.sizes()), " (got ", list(weight.sizes()), ")");
  check_bias(op, bias, weight.size(0), input);
  check_numbers(op, "stride", around.stride, 3, 1);
  check_numbers(op, "padding", around.padding, 3, 0);
  check_numbers(op, "dilation", around.dilation, 3, 1);
}

/// The shape of one channel, after checking that the larger volume, of these sizes, holds the kernel.
ConvShape shape_of(const char* op, const char* name, const std::string& shown, const int64_t* large,
                   const Tensor& weight, const Around& around) {
  ConvShape s{1, 1, {}, {}, {}, {}, {}, {}};
  for (int a = 0; a < 3; ++a) {
    s.in[a] = large[a];
    s.kernel[a] = weight.size(a + 2);
    s.stride[a] = around.stride[a];
    s.padding[a] = around.padding[a];
    s.dilation[a] = around.dilation[a];
    const int64_t free = padded_size(s, a) - kernel_reach(s, a);
    TIMM_EXT_CHECK(s.in[a] >= 1 && free >= 0, op, ": ", name,
                   " with its padding must be at least as large as the kernel (got ", shown, " with padding ",
                   list(around.padding), " for a kernel ", list(weight.sizes()), ")");
    s.out[a] = free / s.stride[a] + 1;
  }
  return s;
}

void check_packed(const char* op, const ConvShape& s) {
  TIMM_EXT_CHECK(depthwise_fits(s, 2), op, ": a channel's phases must hold at most ", kDepthwisePacked,
                 " elements (got kernel ", list({s.kernel[0], s.kernel[1], s.kernel[2]}), ", stride ",
                 list({s.stride[0], s.stride[1], s.stride[2]}), " and output ", list({s.out[0], s.out[1], s.out[2]}),
                 ")");
}

/// Each phase of a transposed convolution's output has sums of its own.
void check_phases(const char* op, const ConvShape& s) {
  constexpr int64_t most = int64_t{1} << 16;
  int64_t phases = 1;
  for (int a = 0; a < 3; ++a) phases = std::min(phases * std::min(s.stride[a], s.in[a]), 2 * most);
  TIMM_EXT_CHECK(phases <= most, op, ": stride must make at most ", most, " phases of size (got stride ",
                 list({s.stride[0], s.stride[1], s.stride[2]}), " and size ", list({s.in[0], s.in[1], s.in[2]}), ")");
}

void run(const ConvShape& shape, bool transposed, const Tensor& input, const Tensor& weight,
         const std::optional<Tensor>& bias, const Tensor& result) {
  const Tensor x = torch::stable::contiguous(input), w = torch::stable::contiguous(weight);
  const cpu::DepthwiseTiling tiling(shape, transposed);
  const cpu::DepthwiseProblem problem{&tiling.layout(), values_of(x),  values_of(w), values_of(bias),
                                      room_of(result),  input.size(0), input.size(1)};
  parallel_for(0, depthwise_units(problem), 1,
               [&](int64_t first, int64_t last) { cpu::depthwise_conv(problem, first, last); });
}

}  // namespace

Tensor depthwise_conv3d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                        std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation) {
  const char* const op = "depthwise_conv3d";
  const Around around{stride, padding, dilation};
  check_arguments(op, input, weight, bias, around);
  const ConvShape s = shape_of(op, "input", list(input.sizes()), input.sizes().data() + 2, weight, around);
  check_padded(op, s, input.size(0));
  check_packed(op, s);
  const Tensor result = new_tensor(input, {input.size(0), input.size(1), s.out[0], s.out[1], s.out[2]});
  if (result.numel() > 0) run(s, false, input, weight, bias, result);
  return result;
}

Tensor depthwise_conv_transpose3d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                  std::vector<int64_t> stride, std::vector<int64_t> padding,
                                  std::vector<int64_t> dilation, std::vector<int64_t> size) {
  const char* const op = "depthwise_conv_transpose3d";
  const Around around{stride, padding, dilation};
  check_arguments(op, input, weight, bias, around);
  check_numbers(op, "size", size, 3, 1);
  const ConvShape s = shape_of(op, "size", list(size), size.data(), weight, around);
  const bool fits = s.out[0] == input.size(2) && s.out[1] == input.size(3) && s.out[2] == input.size(4);
  TIMM_EXT_CHECK(fits, op, ": input must have the sizes that a convolution makes of size, ",
                 list({s.out[0], s.out[1], s.out[2]}), " (got ", list(input.sizes()), ")");
  check_padded(op, s, input.size(0));
  check_packed(op, s);
  check_phases(op, s);
  const Tensor result = new_tensor(input, {input.size(0), input.size(1), size[0], size[1], size[2]});
  if (result.numel() > 0) run(s, true, input, weight, bias, result);
  return result;
}

}  // namespace timm_ext
