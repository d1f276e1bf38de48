// SPDX-License-Identifier: Apache-2.0
//
// Launchers of the merge kernels. Every pointer is a device pointer; `stream` is a cudaStream_t of the current device.
// A call enqueues kernels and returns: no allocation, no synchronisation, no host read of device memory, so it can be
// captured in a CUDA graph. The result of a call depends on its arguments only, bit for bit: no atomics, fixed tiles.
// The return value is a cudaError_t, 0 when the kernels were enqueued. Arguments are checked by the caller.
#pragma once

#include <cstddef>
#include <cstdint>

#include "element.h"

namespace timm_ext::cuda {

/// θ and F of all models and the mixing of each segment.
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

/// merged[p] = θ*_p. One launch. `merged` ([P] element, contiguous) must not overlap the inputs.
int merge_forward(const MergeInputs& inputs, void* merged, void* stream);

/// Bytes of device workspace (16-byte aligned) of merge_backward_log_weight; its content needs no initialisation.
size_t merge_backward_workspace_bytes(int64_t models, int64_t elements, Element element);

/// grad_log_weight[s, t] = c_t of segment s ([S, T], type of log_weight, every entry written). Two launches at most.
int merge_backward_log_weight(const MergeInputs& inputs, const MergeGradient& gradient, void* grad_log_weight,
                              void* workspace, void* stream);

/// Where merge_backward_planes writes; a null pointer skips that plane.
struct MergePlaneGradients {
  void* theta;            // [T, P] element
  void* fisher;           // [T, P] element
  int64_t theta_stride;   // elements
  int64_t fisher_stride;  // elements
};

/// The gradients with respect to θ and F. One launch.
int merge_backward_planes(const MergeInputs& inputs, const MergeGradient& gradient, const MergePlaneGradients& outputs,
                          void* stream);

/// cudaGetErrorString, for callers that do not see the CUDA headers.
const char* error_string(int error);

}  // namespace timm_ext::cuda
