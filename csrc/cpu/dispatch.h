// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <type_traits>

#include "cpu/storage.h"
#include "math/element.h"

namespace timm_ext::cpu {

/// Calls f with a null pointer of the storage type.
template <class F>
TIMM_EXT_FN void with_storage(Element element, const F& f) {
  switch (element) {
    case Element::kFloat32:
      return f(static_cast<float*>(nullptr));
    case Element::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case Element::kFloat16:
      return f(static_cast<Float16*>(nullptr));
    case Element::kFloat64:
      return f(static_cast<double*>(nullptr));
  }
}

template <class Pointer>
using Pointee = std::remove_pointer_t<Pointer>;

template <class Pointer>
using Arithmetic = typename ArithmeticOf<Pointee<Pointer>>::type;

}  // namespace timm_ext::cpu
