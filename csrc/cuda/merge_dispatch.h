// SPDX-License-Identifier: Apache-2.0
//
// From the element type and T of a call to the instance of a kernel. Packed kernels hold all models of a few elements
// in registers and exist for some T only; a call with fewer models takes the next larger one.
#pragma once

#include <type_traits>

#include "merge_tile.h"

namespace timm_ext::cuda {

template <Element kElement>
using ElementTag = std::integral_constant<Element, kElement>;
template <int kModels>
using ModelsTag = std::integral_constant<int, kModels>;

constexpr int kMaxPackedModels = 8;

/// Whether the packed kernels serve this call; the general ones serve any.
inline bool packed(const MergeInputs& in) { return in.element != Element::kFloat64 && in.models <= kMaxPackedModels; }

template <class F>
int with_models(int64_t models, const F& call) {
  if (models <= 2) return call(ModelsTag<2>{});
  if (models == 3) return call(ModelsTag<3>{});
  if (models == 4) return call(ModelsTag<4>{});
  if (models == 5) return call(ModelsTag<5>{});
  return call(ModelsTag<kMaxPackedModels>{});
}

/// call(element tag, models tag, tag of "has a Fisher plane") for the packed kernel of these inputs.
template <class F>
int with_packed(const MergeInputs& in, const F& call) {
  const auto typed = [&](auto element) {
    return with_models(in.models, [&](auto models) {
      return in.fisher ? call(element, models, std::true_type{}) : call(element, models, std::false_type{});
    });
  };
  switch (in.element) {
    case Element::kBFloat16:
      return typed(ElementTag<Element::kBFloat16>{});
    case Element::kFloat16:
      return typed(ElementTag<Element::kFloat16>{});
    default:
      return typed(ElementTag<Element::kFloat32>{});
  }
}

/// Elements of one row of the kernel that serves these inputs.
inline int row_of(const MergeInputs& in) {
  if (!packed(in)) return kWarp;
  return kWarp * vector_bytes(in.element, in.models) / (in.element == Element::kFloat32 ? 4 : 2);
}

template <class P>
bool planes_aligned(const MergeInputs& in) {
  constexpr int kBytes = sizeof(typename P::Vector);
  constexpr int kElementBytes = sizeof(typename P::Bits);
  return aligned(in.theta, in.theta_stride, kElementBytes, kBytes) &&
         (!in.fisher || aligned(in.fisher, in.fisher_stride, kElementBytes, kBytes));
}

}  // namespace timm_ext::cuda
