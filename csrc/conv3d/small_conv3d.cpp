// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "conv3d/arguments.h"
#include "conv3d/cpu/kernels.h"
#include "operators.h"

namespace timm_ext {
namespace {

using torch::stable::parallel_for;

constexpr const char* kOp = "small_conv3d";

/// The shape of the convolution; a mirrored weight is [inputs, outputs, ...].
ConvShape shape_of(const Tensor& input, const Tensor& weight, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, bool mirrored) {
  const bool has_taps = weight.size(2) > 0 && weight.size(3) > 0 && weight.size(4) > 0;
  TIMM_EXT_CHECK(weight.size(mirrored ? 0 : 1) == input.size(1) && has_taps, kOp, ": weight must be ",
                 mirrored ? "[" : "[O, ", input.size(1), mirrored ? ", O, ...], mirrored," : ", ...]", " for input ",
                 list(input.sizes()), " (got ", list(weight.sizes()), ")");
  check_numbers(kOp, "stride", stride, 3, 1);
  check_numbers(kOp, "padding", padding, 3, 0);
  check_numbers(kOp, "dilation", dilation, 3, 1);
  ConvShape s{weight.size(mirrored ? 1 : 0), input.size(1), {}, {}, {}, {}, {}, {}};
  for (int a = 0; a < 3; ++a) {
    s.in[a] = input.size(a + 2);
    s.kernel[a] = weight.size(a + 2);
    s.stride[a] = stride[a];
    s.padding[a] = padding[a];
    s.dilation[a] = dilation[a];
    const int64_t free = padded_size(s, a) - kernel_reach(s, a);
    TIMM_EXT_CHECK(s.in[a] >= 1 && free >= 0, kOp,
                   ": input with its padding must be at least as large as the kernel (got ", list(input.sizes()),
                   " with padding ", list(padding), " for a kernel ", list(weight.sizes()), ")");
    s.out[a] = free / s.stride[a] + 1;
  }
  check_padded(kOp, s, input.size(0));
  return s;
}

/// The columns of all points are made, and of each channel that of all examples with zeros around.
void check_few(const ConvShape& s, int64_t examples, int64_t column) {
  constexpr int64_t most = int64_t{1} << 28;
  TIMM_EXT_CHECK(column <= most / std::max<int64_t>(s.inputs, 1), kOp, ": output must have few points: at most ", most,
                 " factors in all (got ", s.inputs, " channels of ", column, ")");
  TIMM_EXT_CHECK(
      examples * cpu::small_conv_padded(s, 0) * cpu::small_conv_padded(s, 1) * cpu::small_conv_padded(s, 2) <=
          kLargestNumber,
      kOp, ": input with its padding must hold fewer than 2^31 elements for each channel of all examples (got ",
      examples, " examples of ", list({s.in[0], s.in[1], s.in[2]}), ")");
}

/// Where the element of each tap and point lies in the padded channel of all examples; mirrored: the last tap first.
std::vector<int32_t> places_of(const ConvShape& s, int64_t examples, int64_t width, bool mirrored) {
  const int64_t taps = s.kernel[0] * s.kernel[1] * s.kernel[2], points = s.out[0] * s.out[1] * s.out[2];
  const int64_t rows = cpu::small_conv_padded(s, 1), row = cpu::small_conv_padded(s, 2);
  std::vector<int32_t> places(taps * width, 0);
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t k = mirrored ? taps - 1 - tap : tap;
    const int64_t at[3] = {k / s.kernel[2] / s.kernel[1], k / s.kernel[2] % s.kernel[1], k % s.kernel[2]};
    for (int64_t n = 0; n < examples * points; ++n) {
      const int64_t point = n % points, plane = point / s.out[2] / s.out[1];
      const int64_t d = n / points * cpu::small_conv_padded(s, 0) + plane * s.stride[0] + at[0] * s.dilation[0];
      const int64_t h = point / s.out[2] % s.out[1] * s.stride[1] + at[1] * s.dilation[1];
      const int64_t w = point % s.out[2] * s.stride[2] + at[2] * s.dilation[2];
      places[tap * width + n] = static_cast<int32_t>((d * rows + h) * row + w);
    }
  }
  return places;
}

}  // namespace

Tensor small_conv3d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                    bool mirrored) {
  check_volume(kOp, "input", input, 5, input);
  check_volume(kOp, "weight", weight, 5, input);
  const ConvShape s = shape_of(input, weight, stride, padding, dilation, mirrored);
  check_bias(kOp, bias, s.outputs, input);
  const int64_t examples = input.size(0), points = s.out[0] * s.out[1] * s.out[2];
  const Tensor result = new_tensor(input, {examples, s.outputs, s.out[0], s.out[1], s.out[2]});
  if (result.numel() == 0) return result;
  if (s.inputs == 0) {
    write_bias(result, bias);
    return result;
  }

  const int64_t taps = s.kernel[0] * s.kernel[1] * s.kernel[2], each = cpu::kSmallConvPoints;
  const int64_t width = (examples * points + each - 1) / each * each;
  check_few(s, examples, taps * width);
  const std::vector<int32_t> places = places_of(s, examples, width, mirrored);
  const Tensor x = torch::stable::contiguous(input), g = torch::stable::contiguous(weight);
  const Tensor columns = new_tensor(x, {s.inputs * taps * width});
  const cpu::SmallConvProblem problem{&s,
                                      values_of(x),
                                      places.data(),
                                      room_of(columns),
                                      values_of(g),
                                      mirrored ? taps : s.inputs * taps,
                                      mirrored ? s.outputs * taps : taps,
                                      values_of(bias),
                                      room_of(result),
                                      examples,
                                      points,
                                      taps,
                                      width};
  parallel_for(0, s.inputs, 8, [&](int64_t first, int64_t last) { cpu::small_conv_columns(problem, first, last); });
  parallel_for(0, cpu::small_conv_blocks(s), 1,
               [&](int64_t first, int64_t last) { cpu::small_conv(problem, first, last); });
  return result;
}

}  // namespace timm_ext
