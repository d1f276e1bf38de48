// SPDX-License-Identifier: Apache-2.0
//
// Sizes of a convolution, as its kernels on all devices see it. One and two axes are three with sizes of 1; a
// transposed convolution is a plain one with the roles of grad and input exchanged.
#pragma once

#include <cstdint>

namespace timm_ext {

/// One group of a convolution.
struct ConvShape {
  int64_t outputs;  // channels
  int64_t inputs;
  int64_t out[3];  // sizes of grad
  int64_t in[3];   // sizes of the input
  int64_t kernel[3];
  int64_t stride[3];
  int64_t padding[3];
  int64_t dilation[3];
};

}  // namespace timm_ext
