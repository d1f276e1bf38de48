// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime.h>

#include "cuda/error.h"

namespace timm_ext::cuda {

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace timm_ext::cuda
