// SPDX-License-Identifier: Apache-2.0
//
// What the operators of norms ask of their arguments, and the sets of maps that share a mean.
#pragma once

#include <vector>

#include "checks.h"
#include "norm/cpu/kernels.h"

namespace timm_ext {

inline std::vector<int64_t> sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

inline void check_vector(const char* op, const char* name, const Tensor& vector, int64_t size, const Tensor& input) {
  check_same_device(op, name, vector, "input", input);
  check_dtype(op, name, vector, ScalarType::Float, "");
  TIMM_EXT_CHECK(vector.numel() == size && vector.is_contiguous(), op, ": ", name, " must hold ", size,
                 " elements, contiguous, for input ", list(input.sizes()), " (got ", list(vector.sizes()), ")");
}

inline void check_groups(const char* op, int64_t groups, int64_t channels) {
  TIMM_EXT_CHECK(groups > 0 && channels % groups == 0, op, ": groups must divide the channels of input, ", channels,
                 " (got ", groups, ")");
}

/// Of each example, by the mean of all of them.
inline int64_t groups_of_mean(const char* op, const Tensor& mean, const Tensor& input, int64_t channels) {
  const int64_t batch = input.size(0), groups = batch > 0 ? mean.numel() / batch : 0;
  TIMM_EXT_CHECK(batch * channels == 0 || (groups > 0 && channels % groups == 0), op,
                 ": mean must hold a number for each group of channels of each example, for input ",
                 list(input.sizes()), " (got ", list(mean.sizes()), ")");
  return groups;
}

/// Sets of neighbouring channels of each example.
inline cpu::NormSets sets_of_groups(int64_t batch, int64_t groups, int64_t channels, int64_t points) {
  const int64_t members = groups > 0 ? channels / groups : 0;
  return {batch * groups, members, 1, members, channels, points};
}

}  // namespace timm_ext
