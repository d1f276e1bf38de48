// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace timm_ext::cpu::TIMM_EXT_ISA {

/// Uninitialised memory for one call, aligned to a cache line, without the standard library's templates: their code
/// would be shared with files compiled for another instruction set.
template <class C>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(allocate(count * sizeof(C))) {}
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  C* get() const { return data_; }

 private:
  static C* allocate(size_t bytes) {
    void* const data = std::aligned_alloc(64, (bytes / 64 + 1) * 64);
    if (data == nullptr) throw std::bad_alloc();
    return static_cast<C*>(data);
  }

  C* data_;
};

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
