// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdio>

namespace timm_ext::test {

inline int failures = 0;
inline int checks = 0;

/// Counts a failed condition and prints the first twenty; `result()` is what main returns.
template <class... Arguments>
void check(bool condition, const char* format, Arguments... arguments) {
  ++checks;
  if (condition || ++failures > 20) return;
  std::printf("FAILED: ");
  std::printf(format, arguments...);
  std::printf("\n");
}

inline int result() {
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace timm_ext::test
