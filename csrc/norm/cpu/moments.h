// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/isa.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

/// A mean and the sum of squared distances from it.
struct Moments {
  double points = 0;
  double mean = 0;
  double squares = 0;

  void join(const Moments& other) {
    if (points == 0) {
      *this = other;
      return;
    }
    const double together = points + other.points, apart = other.mean - mean;
    mean += apart * other.points / together;
    squares += other.squares + apart * apart * points * other.points / together;
    points = together;
  }
};

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
