// SPDX-License-Identifier: Apache-2.0
#include "cpu/dispatch.h"
#include "fisher/cpu/kernels.h"
#include "math/square.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

template <class S, class C = typename ArithmeticOf<S>::type>
void accumulate(const SquareAccumulateItem& item, int64_t each, double scale, int64_t begin, int64_t end) {
  constexpr int64_t kChunk = 512;
  C* const acc = static_cast<C*>(item.accumulator);
  const C factor = static_cast<C>(scale);
  C scratch[kChunk];
  for (int64_t i = begin; i < end; i += kChunk) {
    const int64_t count = end - i < kChunk ? end - i : kChunk;
    C* const to = acc + i;
    for (int64_t j = 0; j < each; ++j) {
      const C* const g = widen(static_cast<const S*>(item.gradients[j]) + i, count, scratch);
      for (int64_t k = 0; k < count; ++k) to[k] = math::square_accumulate(to[k], g[k], factor);
    }
  }
}

}  // namespace

void square_accumulate(const SquareAccumulateItem& item, int64_t each, Element element, double scale, int64_t begin,
                       int64_t end) {
  with_storage(element, [&](auto* s) { accumulate<Pointee<decltype(s)>>(item, each, scale, begin, end); });
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
