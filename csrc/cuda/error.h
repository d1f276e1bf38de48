// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace timm_ext::cuda {

/// cudaGetErrorString, for callers that do not see the CUDA headers.
const char* error_string(int error);

}  // namespace timm_ext::cuda
