// SPDX-License-Identifier: Apache-2.0
//
// What the convolutions ask of their arguments, so that no kernel meets a number it cannot reckon with in 64 bits.
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include "checks.h"
#include "conv3d/problem.h"
#include "math/half.h"

namespace timm_ext {

/// The largest size, stride, padding or dilation, and elements of a padded channel.
constexpr int64_t kLargestNumber = std::numeric_limits<int32_t>::max();

/// One number for each axis.
inline void check_numbers(const char* op, const char* name, const std::vector<int64_t>& values, int64_t axes,
                          int64_t least) {
  const bool fit = static_cast<int64_t>(values.size()) == axes &&
                   std::all_of(values.begin(), values.end(), [&](int64_t value) { return value >= least; });
  TIMM_EXT_CHECK(fit, op, ": ", name, " must hold ", axes, " numbers >= ", least, " (got ", list(values), ")");
  const bool known = std::all_of(values.begin(), values.end(), [](int64_t value) { return value <= kLargestNumber; });
  TIMM_EXT_CHECK(known, op, ": ", name, " must hold numbers < 2^31 (got ", list(values), ")");
}

inline void check_sizes(const char* op, const char* name, const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  TIMM_EXT_CHECK(std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size <= kLargestNumber; }), op, ": ",
                 name, " must have sizes < 2^31 (got ", list(sizes), ")");
}

inline void check_axes(const char* op, const char* name, const Tensor& tensor, int64_t axes) {
  TIMM_EXT_CHECK(tensor.dim() == axes, op, ": ", name, " must have ", axes, " axes (got ", list(tensor.sizes()), ")");
  check_sizes(op, name, tensor);
}

inline void check_volume(const char* op, const char* name, const Tensor& tensor, int64_t axes, const Tensor& input) {
  check_same_device(op, name, tensor, "input", input);
  check_dtype(op, name, tensor, ScalarType::Float, "");
  check_axes(op, name, tensor, axes);
}

inline bool is_half(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::BFloat16; }

/// [B, C, D, H, W], float32 or bfloat16.
inline void check_stored_volume(const char* op, const char* name, const Tensor& tensor) {
  TIMM_EXT_CHECK(is_half(tensor) || tensor.scalar_type() == ScalarType::Float, op, ": ", name,
                 " must be float32 or bfloat16 (got ", dtype_name(tensor.scalar_type()), ")");
  check_axes(op, name, tensor, 5);
}

inline void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t outputs, const Tensor& input) {
  if (!bias) return;
  check_volume(op, "bias", *bias, 1, input);
  TIMM_EXT_CHECK(bias->size(0) == outputs && bias->is_contiguous(), op, ": bias must be [", outputs,
                 "], contiguous (got ", list(bias->sizes()), ")");
}

/// Whether a product stays below 2^57, which leaves the kernels' own layouts room.
inline bool small_product(std::initializer_list<int64_t> factors) {
  int64_t product = 1 << 6;
  return std::all_of(factors.begin(), factors.end(),
                     [&](int64_t factor) { return !__builtin_mul_overflow(product, factor, &product); });
}

/// Of the axis of a convolution whose numbers are below 2^31, the size of the input with its padding, and how far the
/// taps of a point reach.
inline int64_t padded_size(const ConvShape& s, int axis) { return s.in[axis] + 2 * s.padding[axis]; }
inline int64_t kernel_reach(const ConvShape& s, int axis) { return (s.kernel[axis] - 1) * s.dilation[axis] + 1; }

/// Kernels go through whole channels with their padding, which may be large, but not of nothing else: memory is taken
/// for it. Returns the elements of such a channel.
inline int64_t check_padded(const char* op, const ConvShape& s, int64_t examples) {
  constexpr int64_t few = int64_t{1} << 28, times = 8;
  int64_t padded = 1, bare = 1;
  bool fit = true;
  for (int a = 0; a < 3; ++a) {
    fit = fit && !__builtin_mul_overflow(padded, padded_size(s, a), &padded) && padded <= kLargestNumber;
    if (fit) bare *= s.in[a];
  }
  const int64_t most = fit ? std::clamp(times * bare, few, kLargestNumber) : few;
  TIMM_EXT_CHECK(fit && padded <= most && small_product({examples, std::max(s.inputs, s.outputs), padded}), op,
                 ": input with its padding must hold at most ", most, " elements for each channel (got ",
                 list({padded_size(s, 0), padded_size(s, 1), padded_size(s, 2)}), " for ", s.inputs, " channels)");
  return padded;
}

/// Sums of neighbours, one more on each axis than the volume of even sizes whose they are.
inline void check_sums(const char* op, const Tensor& sums) {
  const bool odd = sums.size(2) % 2 == 1 && sums.size(3) % 2 == 1 && sums.size(4) % 2 == 1;
  TIMM_EXT_CHECK(odd, op, ": sums must have odd sizes (got ", list(sums.sizes()), ")");
}

template <class S>
void write_bias_as(S* to, int64_t planes, int64_t outputs, int64_t points, const float* values) {
  for (int64_t plane = 0; plane < planes; ++plane) {
    S stored;
    math::from_float(stored, values != nullptr ? values[plane % outputs] : 0.0f);
    std::fill_n(to + plane * points, points, stored);
  }
}

/// What a convolution of no input channels gives, [examples, outputs, ...]: the bias, or 0.
inline void write_bias(const Tensor& result, const std::optional<Tensor>& bias) {
  const int64_t outputs = result.size(1), planes = result.size(0) * outputs, points = result.numel() / planes;
  if (is_half(result)) {
    auto* const to = static_cast<math::BFloat16*>(result.mutable_data_ptr());
    write_bias_as(to, planes, outputs, points, values_of(bias));
  } else {
    write_bias_as(room_of(result), planes, outputs, points, values_of(bias));
  }
}

}  // namespace timm_ext
