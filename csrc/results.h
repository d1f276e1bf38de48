// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cpu/pages.h"
#include "operators.h"

namespace timm_ext {

/// An uninitialised result of the dtype and device of another tensor.
inline Tensor new_result(const Tensor& like, const std::vector<int64_t>& sizes) {
  const Tensor result = torch::stable::new_empty(like, sizes);
  if (result.is_cpu()) cpu::prefer_huge_pages(result.mutable_data_ptr(), result.numel() * result.element_size());
  return result;
}

}  // namespace timm_ext
