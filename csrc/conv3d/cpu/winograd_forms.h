// SPDX-License-Identifier: Apache-2.0
//
// The forms of the inputs of a few rows of the output, in the second-level cache: [16, inputs, pairs of rows, columns],
// zero where the padding is.
#pragma once

#include "conv3d/cpu/row_forms.h"
#include "conv3d/cpu/winograd.h"
#include "cpu/lanes.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

/// What two vectors of the output cover.
struct WinogradTile {
  explicit WinogradTile(const ConvShape& s)
      : vector_rows(2 * s.out[2] <= kLanes ? 2 : 1),
        row_vectors((s.out[2] + kLanes - 1) / kLanes),
        pairs(row_vectors % 2 == 1 ? 2 * vector_rows : 1),
        lead(whole_vectors(s.padding[2])),
        pitch(whole_vectors(
            larger_of(larger_of(s.out[2], kLanes / vector_rows) + s.kernel[2] - 1, s.in[2] + 2 * s.padding[2]) -
            s.padding[2])) {}

  int64_t vector_rows;  // two short rows share a vector
  int64_t row_vectors;  // or some vectors a row, of which the last may overlap the one before
  int64_t pairs;        // of rows whose forms are made at a time
  int64_t lead;         // zeros in front of a row's first column
  int64_t pitch;        // from a row of a form to the next: of whole vectors, whose zeros at the end lead the next one
};

class InputForms {
 public:
  static int64_t elements(const ConvShape& s) {
    const WinogradTile tile(s);
    return zeros(s) + tile.lead + kWinogradForms * s.inputs * tile.pairs * tile.pitch + tile.lead + kLanes;
  }

  /// In memory that is zero.
  InputForms(const ConvShape& s, const WinogradTile& tile, float* memory)
      : s_(s), tile_(tile), zeros_(memory), forms_(memory + zeros(s) + tile.lead - s.padding[2]) {}

  /// Makes those for rows of the output from a plane and a row on.
  void make(const float* input, int64_t plane, int64_t row) const {
    for (int64_t pair = 0; pair < tile_.pairs; ++pair) make_pair(input, plane, row + 2 * pair, pair);
  }

  float* row(int64_t form, int64_t input, int64_t pair) const {
    return forms_ + ((form * s_.inputs + input) * tile_.pairs + pair) * tile_.pitch;
  }

 private:
  using Rows = const float* [kWinogradForms];  // four planes of four

  static int64_t zeros(const ConvShape& s) { return (s.in[2] + kLanes - 1) / kLanes * kLanes; }

  /// A row of the first channel of the input, or null where there is none.
  const float* input_row(const float* input, int64_t plane, int64_t row) const {
    const int64_t d = plane - s_.padding[0], h = row - s_.padding[1];
    const bool there = d >= 0 && d < s_.in[0] && h >= 0 && h < s_.in[1];
    return there ? input + (d * s_.in[1] + h) * s_.in[2] : nullptr;
  }

  /// Of all channels; the rows of the next one are fetched ahead.
  void make_pair(const float* input, int64_t plane, int64_t first_row, int64_t pair) const {
    const int64_t channel = s_.in[0] * s_.in[1] * s_.in[2];
    Rows rows;
    int64_t steps[kWinogradForms];
    for (int64_t r = 0; r < kWinogradForms; ++r) {
      const float* const from = input_row(input, plane + r / 4, first_row + r % 4);
      rows[r] = from != nullptr ? from : zeros_;
      steps[r] = from != nullptr ? channel : 0;
    }
    for (int64_t i = 0; i < s_.inputs; ++i) {
      float* const to = row(0, i, pair) + s_.padding[2];
      if (s_.in[2] >= kLanes) {
        make_row<V, kLanes>(rows, to);
      } else if (2 * s_.in[2] >= kLanes) {
        make_row<math::HalfFloatV, kLanes / 2>(rows, to);
      } else {
        make_row<float, 1>(rows, to);
      }
      for (int64_t r = 0; r < kWinogradForms; ++r) rows[r] += steps[r];
    }
  }

  /// At least C's lanes; the last of them may overlap those before.
  template <class C, int64_t Lanes>
  void make_row(const Rows& rows, float* to) const {
    const int64_t form = row(1, 0, 0) - row(0, 0, 0), channel = s_.in[0] * s_.in[1] * s_.in[2];
    for (int64_t w = 0; w < s_.in[2]; w += Lanes) {
      for (int64_t r = 0; r < kWinogradForms; ++r) __builtin_prefetch(rows[r] + channel + w);
      const int64_t at = smaller_of(w, s_.in[2] - Lanes);
      write_input_forms<C>(rows, at, to + at, form);
    }
  }

  const ConvShape& s_;
  const WinogradTile& tile_;
  const float* zeros_;  // a row of the input
  float* forms_;
};

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
