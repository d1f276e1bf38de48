// SPDX-License-Identifier: Apache-2.0
//
// CPU kernels as the operators see them. Their files (kernel_sources of CMakeLists.txt) are compiled once per
// instruction set, into a namespace of that name; the set is chosen at the first call. Every set gives the same bits,
// except in the convolutions. A kernel works on a range of blocks or units, so that the caller may hand these to
// threads in any way.
#pragma once

#include <type_traits>
#include <utility>

#include "cpu/isa.h"

namespace timm_ext::cpu {

/// One function, compiled for each of built_isas(); a call goes to that of chosen_isa(), whose errors it throws.
template <auto... functions>
struct Kernel {
  static auto chosen() {
    constexpr std::common_type_t<decltype(functions)...> kFunctions[] = {functions...};
    return kFunctions[chosen_isa_number()];
  }

  template <class... Arguments>
  void operator()(Arguments&&... arguments) const {
    chosen()(std::forward<Arguments>(arguments)...);
  }
};

// TIMM_EXT_KERNEL(name, parameters...) declares the kernel `name`, which returns nothing.
#if defined(TIMM_EXT_X86)
#define TIMM_EXT_KERNEL(name, ...) \
  namespace baseline {             \
  void name(__VA_ARGS__);          \
  }                                \
  namespace avx2 {                 \
  void name(__VA_ARGS__);          \
  }                                \
  namespace avx512 {               \
  void name(__VA_ARGS__);          \
  }                                \
  inline constexpr Kernel<&baseline::name, &avx2::name, &avx512::name> name
#else
#define TIMM_EXT_KERNEL(name, ...) \
  namespace baseline {             \
  void name(__VA_ARGS__);          \
  }                                \
  inline constexpr Kernel<&baseline::name> name
#endif

}  // namespace timm_ext::cpu
