// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "checks.h"
#include "memory/cpu/memory_pool.h"
#include "memory/cpu/pages.h"
#include "operators.h"

// Of the stable ABI at version 2.11; null in an older one. Declared here since the headers hide it at version 2.10.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError torch_from_blob(
    void* data, int64_t dimensions, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* metadata,
    int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace timm_ext {
namespace {

void give_back(void* data, void* bytes) { cpu::MemoryPool::instance().give(data, reinterpret_cast<size_t>(bytes)); }

/// A tensor over a block of the pool, which goes back with the tensor's storage. (Where none can be made, torch may
/// have given the block back or not: it is given up.)
Tensor over(void* block, size_t bytes, const Tensor& like, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * sizes[i];
  int32_t dtype, layout;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
      block, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, dtype, aoti_torch_device_type_cpu(),
      like.get_device_index(), &handle, layout, nullptr, 0, &give_back, reinterpret_cast<void*>(bytes)));
  return Tensor(handle);
}

/// Nothing where they are no sizes of a tensor that could be; torch says so.
std::optional<size_t> bytes_of(const Tensor& like, const std::vector<int64_t>& sizes) {
  size_t bytes = like.element_size();
  for (const int64_t size : sizes) {
    if (size < 0 || __builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes)) return std::nullopt;
  }
  return bytes;
}

/// The stable ABI keeps torch's own message to itself.
Tensor from_torch(const Tensor& like, const std::vector<int64_t>& sizes) {
  try {
    return torch::stable::new_empty(like, sizes);
  } catch (const std::exception&) {
    fail("timm_ext: sizes must be those of a tensor for which there is memory on ", device_name(like), " (got ",
         list(sizes), " of ", like.element_size(), " bytes each)");
    throw;
  }
}

}  // namespace

void keep_memory(bool on) {
  if (on) {
    cpu::MemoryPool::instance().open();
  } else {
    cpu::MemoryPool::instance().close();
  }
}

void release_memory() { cpu::MemoryPool::instance().release(); }

int64_t kept_bytes() { return static_cast<int64_t>(cpu::MemoryPool::instance().held()); }

Tensor new_tensor(const Tensor& like, std::vector<int64_t> sizes) {
  if (like.is_cpu() && torch_from_blob != nullptr) {
    const std::optional<size_t> bytes = bytes_of(like, sizes);
    void* const block = bytes ? cpu::MemoryPool::instance().take(*bytes) : nullptr;
    if (block != nullptr) return over(block, *bytes, like, sizes);
  }
  const Tensor result = from_torch(like, sizes);
  if (result.is_cpu()) cpu::prefer_huge_pages(result.mutable_data_ptr(), result.numel() * result.element_size());
  return result;
}

}  // namespace timm_ext
