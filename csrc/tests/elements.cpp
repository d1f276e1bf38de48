// SPDX-License-Identifier: Apache-2.0
#include "tests/elements.h"

#include <cstring>

#include "cuda/storage.h"

namespace timm_ext::test {
namespace {

using cuda::Storage;

template <class F>
auto with_storage(Element element, const F& call) {
  switch (element) {
    case Element::kFloat64:
      return call(Storage<Element::kFloat64>{});
    case Element::kBFloat16:
      return call(Storage<Element::kBFloat16>{});
    case Element::kFloat16:
      return call(Storage<Element::kFloat16>{});
    default:
      return call(Storage<Element::kFloat32>{});
  }
}

}  // namespace

int element_bytes(Element element) {
  return with_storage(element, [](auto storage) { return static_cast<int>(sizeof(typename decltype(storage)::Bits)); });
}

double decode(Element element, const void* values, int64_t i) {
  return with_storage(element, [&](auto storage) -> double {
    typename decltype(storage)::Bits bits;
    std::memcpy(&bits, static_cast<const unsigned char*>(values) + i * sizeof(bits), sizeof(bits));
    return storage.decode(bits);
  });
}

void encode(Element element, void* values, int64_t i, double value) {
  with_storage(element, [&](auto storage) {
    const auto bits = storage.encode(static_cast<typename decltype(storage)::Compute>(value));
    std::memcpy(static_cast<unsigned char*>(values) + i * sizeof(bits), &bits, sizeof(bits));
    return 0;
  });
}

double storage_rounding(Element element) {
  return element == Element::kBFloat16 ? 0x1p-8 : element == Element::kFloat16 ? 0x1p-11 : 0.0;
}

double storage_step(Element element) {
  if (element == Element::kFloat16) return 0x1p-24;
  return element == Element::kBFloat16 ? 0x1p-133 : element == Element::kFloat32 ? 0x1p-149 : 0.0;
}

double arithmetic_rounding(Element element) { return element == Element::kFloat64 ? 0x1p-53 : 0x1p-24; }

Buffer::Buffer(Element element, int64_t count, int64_t offset)
    : offset_bytes_(offset * element_bytes(element)),
      size_(count * element_bytes(element)),
      bytes_(new unsigned char[offset_bytes_ + size_]) {
  std::memset(bytes_.get(), 0xFF, offset_bytes_ + size_);
}

}  // namespace timm_ext::test
