// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "../cuda/element.h"
#include "storage.h"

namespace timm_ext::cpu {

/// Calls f with a null pointer of the storage type.
template <class F>
TIMM_EXT_FN void with_storage(cuda::Element element, const F& f) {
  switch (element) {
    case cuda::Element::kFloat32:
      return f(static_cast<float*>(nullptr));
    case cuda::Element::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case cuda::Element::kFloat16:
      return f(static_cast<Float16*>(nullptr));
    case cuda::Element::kFloat64:
      return f(static_cast<double*>(nullptr));
  }
}

template <class Pointer>
using Pointee = std::remove_pointer_t<Pointer>;

template <class Pointer>
using Arithmetic = typename ArithmeticOf<Pointee<Pointer>>::type;

}  // namespace timm_ext::cpu
