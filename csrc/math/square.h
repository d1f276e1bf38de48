// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "math/portable.h"

namespace timm_ext::math {

/// acc + scale·g². The scale goes in first: g² alone leaves float's range for |g| below 1e-19 or above 1e19.
template <class V, class C>
TIMM_EXT_FN V square_accumulate(V acc, V g, C scale) {
  return acc + (g * scale) * g;
}

}  // namespace timm_ext::math
