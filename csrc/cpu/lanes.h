// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "math/simd.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

using V = math::FloatV;
constexpr int64_t kLanes = sizeof(V) / sizeof(float);

TIMM_EXT_FN int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
TIMM_EXT_FN int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
TIMM_EXT_FN int64_t whole_vectors(int64_t elements) { return (elements + kLanes - 1) / kLanes * kLanes; }

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
