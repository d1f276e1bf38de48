// SPDX-License-Identifier: Apache-2.0
//
// Sums of products over a row of points: a block of outputs × inputs in registers, at one tap or at three neighbours.
#pragma once

#include "conv3d/cpu/conv_square.h"
#include "conv3d/cpu/tile.h"
#include "math/shuffle.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

/// What is summed at a time: `Vectors` vectors of values of grad × `Inputs` inputs at `Taps` taps, 1 or 3.
template <int Taps, int Vectors, int Inputs, bool Halves>
struct BlockOf {
  static constexpr int kTaps = Taps;
  static constexpr int kVectors = Vectors;
  static constexpr int kInputs = Inputs;
  static constexpr bool kHalves = Halves;
  static constexpr int kSums = Inputs * Vectors;  // of a tap

  using Sums = V[Taps][Inputs][Vectors];

  static TIMM_EXT_FN V input(const float* x, int i) {
    return Halves ? math::broadcast_pair(x + 2 * i) : math::broadcast(x + i);
  }
};

/// Rows of a tap, or of three: `points` of grad, and the non-padding ones among the points [first, last) of the row;
/// the latter count grad's points for one tap, the input's for three.
struct RowPoints {
  int64_t points;
  int64_t first;
  int64_t last;
  int64_t grad_step;  // elements from a point to the next
  int64_t input_step;
};

template <class B>
TIMM_EXT_FN void add_row_of_one(const float* g, const float* x, const RowPoints& row, typename B::Sums& sums) {
  g += row.first * row.grad_step;
  x += row.first * row.input_step;
  add_products(
      row.last - row.first, [&](int64_t w, int i) { return B::input(x + w * row.input_step, i); },
      [&](int64_t w, int v) { return math::load<V>(g + w * row.grad_step + v * kLanes); }, sums[0]);
}

/// With stride and dilation 1: a point of the input meets three points of grad, of which two are still in registers.
template <class B>
TIMM_EXT_FN void add_row_of_three(const float* g, const float* x, const RowPoints& row, typename B::Sums& sums) {
  const auto factor = [&](int64_t w, int v) {
    return w >= 0 && w < row.points ? math::load<V>(g + w * row.grad_step + v * kLanes) : V{};
  };
  V factors[3][B::kVectors];
  for (int v = 0; v < B::kVectors; ++v) {
    factors[0][v] = factor(row.first - 1, v);
    factors[1][v] = factor(row.first - 2, v);
  }
  x += row.first * row.input_step;
  for (int64_t w = row.first; w < row.last; ++w, x += row.input_step) {
    for (int v = 0; v < B::kVectors; ++v) {
      factors[2][v] = factors[1][v];
      factors[1][v] = factors[0][v];
      factors[0][v] = factor(w, v);
    }
    for (int i = 0; i < B::kInputs; ++i) {
      const V value = B::input(x, i);
      for (int tap = 0; tap < 3; ++tap) {
        for (int v = 0; v < B::kVectors; ++v) sums[tap][i][v] += factors[tap][v] * value;
      }
    }
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
