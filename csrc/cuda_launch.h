// SPDX-License-Identifier: Apache-2.0
//
// The way from an operator to a CUDA launcher: device guard, current stream, launch check. No CUDA header is needed,
// so this compiles beside a CPU build of PyTorch, too.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "checks.h"

#if defined(TIMM_EXT_CUDA)
#include "cuda/error.h"

// Weak: libtorch of a CPU build does not have it, and the same library loads there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);
#endif

namespace timm_ext {

/// Calls launcher(stream) on the device and the current stream of `tensor`; the launcher returns a cudaError_t.
template <class Launcher>
void launch_on_device_of(const char* op, const Tensor& tensor, const Launcher& launcher) {
#if defined(TIMM_EXT_CUDA)
  const auto device = tensor.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  TIMM_EXT_CHECK(aoti_torch_get_current_cuda_stream != nullptr, op,
                 ": a CUDA tensor needs a CUDA build of PyTorch (got a CPU build)");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const int error = launcher(stream);
  TIMM_EXT_CHECK(error == 0, op, ": the CUDA kernel could not be launched (", cuda::error_string(error), ")");
#else
  (void)tensor;
  (void)launcher;
  fail(op, ": timm_ext must be built with its CUDA kernels for CUDA tensors (got a build without nvcc; put ",
       "nvcc on PATH and run 'TIMM_EXT_CUDA=1 pip install --force-reinstall --no-deps .')");
#endif
}

}  // namespace timm_ext
