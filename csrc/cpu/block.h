// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace timm_ext::cpu {

/// Elements of a block of a flat buffer: θ and F of five models in float32 fit in a megabyte.
constexpr int64_t kBlock = 16384;

inline int64_t block_count(int64_t elements) { return (elements + kBlock - 1) / kBlock; }

}  // namespace timm_ext::cpu
