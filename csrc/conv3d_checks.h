// SPDX-License-Identifier: Apache-2.0
//
// What the convolutions of float32 volumes on the CPU ask of their arguments.
#pragma once

#include <algorithm>
#include <vector>

#include "checks.h"

namespace timm_ext {

inline void check_volume(const char* op, const char* name, const Tensor& tensor, int64_t axes, const Tensor& input) {
  check_same_device(op, name, tensor, "input", input);
  check_dtype(op, name, tensor, ScalarType::Float, "");
  check(tensor.dim() == axes, op, ": ", name, " must have ", axes, " axes (got ", list(tensor.sizes()), ")");
}

inline void check_bias(const char* op, const std::optional<Tensor>& bias, int64_t outputs, const Tensor& input) {
  if (!bias) return;
  check_volume(op, "bias", *bias, 1, input);
  check(bias->size(0) == outputs && bias->is_contiguous(), op, ": bias must be [", outputs, "], contiguous (got ",
        list(bias->sizes()), ")");
}

/// Three numbers, one for each axis.
inline void check_three(const char* op, const char* name, const std::vector<int64_t>& values, int64_t least) {
  const bool fit =
      values.size() == 3 && std::all_of(values.begin(), values.end(), [&](int64_t value) { return value >= least; });
  check(fit, op, ": ", name, " must hold 3 numbers >= ", least, " (got ", list(values), ")");
}

/// Sums of neighbours, one more on each axis than the volume of even sizes whose they are.
inline void check_sums(const char* op, const Tensor& sums) {
  const bool odd = sums.size(2) % 2 == 1 && sums.size(3) % 2 == 1 && sums.size(4) % 2 == 1;
  check(odd, op, ": sums must have odd sizes (got ", list(sums.sizes()), ")");
}

}  // namespace timm_ext
