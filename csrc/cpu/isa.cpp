// SPDX-License-Identifier: Apache-2.0
#include "cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace timm_ext::cpu {
namespace {

bool cpu_supports(const std::string& isa) {
#if defined(TIMM_EXT_X86)
  if (isa == "avx2")
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == "baseline";
}

}  // namespace

std::vector<std::string> built_isas() {
#if defined(TIMM_EXT_X86)
  return {"baseline", "avx2", "avx512"};
#else
  return {"baseline"};
#endif
}

std::string chosen_isa() {
  std::string best;
  std::string usable;
  for (const std::string& isa : built_isas()) {
    if (!cpu_supports(isa)) continue;
    best = isa;
    usable += (usable.empty() ? "" : ", ") + isa;
  }
  const char* wanted = std::getenv("TIMM_EXT_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (const std::string& isa : built_isas()) {
    if (isa == wanted && cpu_supports(isa)) return isa;
  }
  throw std::runtime_error("TIMM_EXT_ISA: must be one of " + usable + " on this CPU (got '" + wanted + "')");
}

int chosen_isa_number() {
  static const int number = [] {
    const std::vector<std::string> built = built_isas();
    return static_cast<int>(std::find(built.begin(), built.end(), chosen_isa()) - built.begin());
  }();
  return number;
}

}  // namespace timm_ext::cpu
