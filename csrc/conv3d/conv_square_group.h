// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace timm_ext {

/// Where a group of channels begins, and elements from one example to the next. Stored as S, float or bfloat16.
template <class S>
struct ConvGroup {
  const S* grad;
  const S* input;
  int64_t grad_example;
  int64_t input_example;
  float* accumulator;
  int64_t accumulator_elements;  // of all groups

  ConvGroup at(int64_t group, int64_t groups) const {
    return {grad + group * (grad_example / groups),
            input + group * (input_example / groups),
            grad_example,
            input_example,
            accumulator + group * (accumulator_elements / groups),
            accumulator_elements};
  }
};

}  // namespace timm_ext
