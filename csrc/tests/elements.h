// SPDX-License-Identifier: Apache-2.0
//
// Elements of any storage type as doubles, and memory for them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "math/element.h"

namespace timm_ext::test {

using timm_ext::Element;

constexpr Element kElements[] = {Element::kFloat32, Element::kBFloat16, Element::kFloat16, Element::kFloat64};

int element_bytes(Element element);
double decode(Element element, const void* values, int64_t i);
void encode(Element element, void* values, int64_t i, double value);
/// The largest relative error of rounding to the storage type; 0 where the arithmetic type is stored.
double storage_rounding(Element element);
/// The step of the smallest numbers of the storage type.
double storage_step(Element element);
/// 2^-24 or 2^-53.
double arithmetic_rounding(Element element);

/// A block of elements that AddressSanitizer guards at both ends, after `offset` elements; filled with NaN.
class Buffer {
 public:
  Buffer(Element element, int64_t count, int64_t offset = 0);
  void* data() { return bytes_.get() + offset_bytes_; }
  const void* data() const { return bytes_.get() + offset_bytes_; }
  size_t size() const { return size_; }

 private:
  size_t offset_bytes_;
  size_t size_;
  std::unique_ptr<unsigned char[]> bytes_;
};

}  // namespace timm_ext::test
