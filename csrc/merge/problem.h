// SPDX-License-Identifier: Apache-2.0
//
// The merge and its gradients as the kernels of every device see them. Arguments are checked by the caller.
#pragma once

#include <cstdint>

#include "math/element.h"

namespace timm_ext {

/// θ and F of all models and the mixing of each segment, on one device.
struct MergeInputs {
  const void* theta;       // [T, P] element; row t starts at theta + t * theta_stride
  const void* fisher;      // [T, P] element, or null for F = 1
  const void* log_weight;  // [S, T] contiguous; float, or double when element is kFloat64; -inf allowed
  const int64_t* offsets;  // [S + 1]; offsets[0] = 0, offsets[S] = P, strictly increasing
  int64_t theta_stride;    // elements, >= P; 16-byte vectors are used when rows are 16-byte aligned
  int64_t fisher_stride;   // elements, >= P
  int64_t segments;        // S
  int64_t models;          // T >= 1
  int64_t elements;        // P >= 0
  Element element;
};

/// The gradient that flows back into merged[P].
struct MergeGradient {
  const void* values;  // [P] element
  int64_t stride;      // 1, or 0 when one value stands for all (the gradient of a sum)
};

/// Where the gradients of θ and F are written; a null pointer skips that matrix.
struct MergeMatrixGradients {
  void* theta;            // [T, P] element
  void* fisher;           // [T, P] element
  int64_t theta_stride;   // elements
  int64_t fisher_stride;  // elements
};

}  // namespace timm_ext
