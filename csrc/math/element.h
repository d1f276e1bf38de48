// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace timm_ext {

/// Storage type of a matrix. Arithmetic is float, except for kFloat64 where it is double.
enum class Element : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

}  // namespace timm_ext
