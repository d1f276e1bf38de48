// SPDX-License-Identifier: Apache-2.0
//
// From the element type and T of a call to the instance of a kernel. Packed kernels hold all models of a few elements
// in registers and exist for some T only; a call with fewer models takes the next larger one.
#pragma once

#include <type_traits>

#include "merge/cuda/packs.h"

namespace timm_ext::cuda {

template <Element kElement>
using ElementTag = std::integral_constant<Element, kElement>;

constexpr int kMaxPackedModels = 16;

/// Whether the packed kernels serve this call; the general ones serve any.
inline bool packed(const MergeInputs& in) { return in.element != Element::kFloat64 && in.models <= kMaxPackedModels; }

template <int... kChoices>
struct ModelChoices {};
using AllModels = ModelChoices<2, 3, 4, 5, 8, kMaxPackedModels>;

template <class F, int kFirst, int... kRest>
int with_models(ModelChoices<kFirst, kRest...>, int64_t models, const F& call) {
  if constexpr (sizeof...(kRest) > 0) {
    if (models > kFirst) return with_models(ModelChoices<kRest...>{}, models, call);
  }
  return call(std::integral_constant<int, kFirst>{});
}

/// call(packs) with a null pointer to the Packs of the packed kernel that serves these inputs.
template <class Choices, class F>
int with_packed(const MergeInputs& in, const F& call) {
  const auto typed = [&](auto element) {
    return with_models(Choices{}, in.models, [&](auto models) {
      if (in.fisher) return call(static_cast<Packs<element(), models(), true>*>(nullptr));
      return call(static_cast<Packs<element(), models(), false>*>(nullptr));
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

}  // namespace timm_ext::cuda
