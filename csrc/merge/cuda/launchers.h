// SPDX-License-Identifier: Apache-2.0
//
// Launchers of the merge kernels. Every pointer is a device pointer; `stream` is a cudaStream_t of the current device.
// A call enqueues kernels and returns: no allocation, no synchronisation, no host read of device memory, so it can be
// captured in a CUDA graph. The result of a call depends on its arguments only, bit for bit: no atomics, fixed tiles.
// The return value is a cudaError_t, 0 when the kernels were enqueued. Arguments are checked by the caller.
#pragma once

#include <cstddef>
#include <cstdint>

#include "merge/problem.h"

namespace timm_ext::cuda {

/// merged[p] = θ*_p. One launch. `merged` ([P] element, contiguous) must not overlap the inputs.
int merge_forward(const MergeInputs& inputs, void* merged, void* stream);

/// Bytes of device workspace (16-byte aligned) of merge_backward_log_weight; its content needs no initialisation.
size_t merge_backward_workspace_bytes(int64_t models, int64_t elements, Element element);

/// grad_log_weight[s, t] = c_t of segment s ([S, T], type of log_weight, every entry written). Two launches at most.
int merge_backward_log_weight(const MergeInputs& inputs, const MergeGradient& gradient, void* grad_log_weight,
                              void* workspace, void* stream);

/// The gradients with respect to θ and F. One launch.
int merge_backward_matrices(const MergeInputs& inputs, const MergeGradient& gradient,
                            const MergeMatrixGradients& outputs, void* stream);

}  // namespace timm_ext::cuda
