// SPDX-License-Identifier: Apache-2.0
//
// The forms of the inputs of some tile rows, in the second-level cache: [forms, inputs, tile rows, pitch] and some
// lanes more behind the last tile row. Zero where the padding is.
#pragma once

#include <cstring>

#include "conv3d/cpu/winograd.h"
#include "conv3d/cpu/winograd_axis.h"
#include "cpu/lanes.h"
#include "math/partial.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

/// The first row of a tile in the output of an example.
struct WinogradTile {
  WinogradTile(const ConvShape& s, const WinogradTiling& tiling, int64_t tile_row)
      : example(tile_row / tiling.tile_rows),
        plane(tile_row % tiling.tile_rows / tiling.row_tiles * tiling.planes),
        row(tile_row % tiling.row_tiles * tiling.rows),
        planes(smaller_of(tiling.planes, s.out[0] - plane)),
        rows(smaller_of(tiling.rows, s.out[1] - row)) {}

  int64_t example;
  int64_t plane;
  int64_t row;
  int64_t planes;  // that the output has
  int64_t rows;
};

class InputForms {
 public:
  static int64_t elements(const ConvShape& s, const WinogradTiling& tiling, int64_t tile_rows) {
    const int64_t beyond = s.padding[2] + s.kernel[2] + 2 * kLanes;
    return whole_vectors(s.in[2]) +
           tiling.forms() * winograd_form_step(s.inputs * line_elements(s, tiling, tile_rows)) + beyond;
  }

  /// In memory that is zero.
  InputForms(const ConvShape& s, const WinogradTiling& tiling, int64_t tile_rows, float* memory)
      : s_(s),
        tiling_(tiling),
        line_(line_elements(s, tiling, tile_rows)),
        form_(winograd_form_step(s.inputs * line_)),
        zeros_(memory),
        forms_(memory + whole_vectors(s.in[2])) {}

  const float* form(int64_t number) const { return forms_ + number * form_; }
  int64_t line() const { return line_; }  // from a channel to the next

  /// Those of a tile row, the r-th here; others after it must be made later.
  template <class Planes, class Rows>
  void make(const float* input, const WinogradTile& tile, int64_t r) const {
    constexpr int kTileRows = Planes::kForms * Rows::kForms;
    const int64_t channel = s_.in[0] * s_.in[1] * s_.in[2];
    const float* rows[kTileRows];
    int64_t steps[kTileRows];
    for (int k = 0; k < kTileRows; ++k) {
      const float* const from = input_row(input, tile, k / Rows::kForms, k % Rows::kForms);
      rows[k] = from != nullptr ? from : zeros_;
      steps[k] = from != nullptr ? channel : 0;
    }
    float* to = forms_ + r * tiling_.pitch + s_.padding[2];
    for (int64_t i = 0; i < s_.inputs; ++i, to += line_) {
      int64_t w = 0;
      for (; w + kLanes <= s_.in[2]; w += kLanes) {
        for (int k = 0; k < kTileRows; ++k) __builtin_prefetch(rows[k] + steps[k] + w);
        write<Planes, Rows>([&](int k) { return math::load<V>(rows[k] + w); }, to + w);
      }
      if (w < s_.in[2]) write<Planes, Rows>([&](int k) { return math::load_first(rows[k] + w, s_.in[2] - w); }, to + w);
      for (int k = 0; k < kTileRows; ++k) rows[k] += steps[k];
    }
  }

 private:
  /// What whole vectors write beyond a tile row, the next one covers.
  static int64_t line_elements(const ConvShape& s, const WinogradTiling& tiling, int64_t tile_rows) {
    return tile_rows * tiling.pitch + whole_vectors(s.in[2]) - s.in[2];
  }

  /// A row of the first channel of the input, or null where there is none.
  const float* input_row(const float* input, const WinogradTile& tile, int64_t plane, int64_t row) const {
    const int64_t d = tile.plane + plane - s_.padding[0], h = tile.row + row - s_.padding[1];
    const bool there = d >= 0 && d < s_.in[0] && h >= 0 && h < s_.in[1];
    return there ? input + ((tile.example * s_.inputs * s_.in[0] + d) * s_.in[1] + h) * s_.in[2] : nullptr;
  }

  /// A vector of each form of the rows that load(number) gives.
  template <class Planes, class Rows, class Load>
  TIMM_EXT_FN void write(const Load& load, float* to) const {
    V over_rows[Rows::kForms][Planes::kForms];
    for (int d = 0; d < Planes::kForms; ++d) {
      V row[Rows::kForms], factors[Rows::kForms];
      for (int h = 0; h < Rows::kForms; ++h) row[h] = load(d * Rows::kForms + h);
      Rows::inputs(row, factors);
      for (int h = 0; h < Rows::kForms; ++h) over_rows[h][d] = factors[h];
    }
    for (int h = 0; h < Rows::kForms; ++h) {
      V factors[Planes::kForms];
      Planes::inputs(over_rows[h], factors);
      for (int d = 0; d < Planes::kForms; ++d) math::store(to + (d * Rows::kForms + h) * form_, factors[d]);
    }
  }

  const ConvShape& s_;
  const WinogradTiling& tiling_;
  int64_t line_;
  int64_t form_;        // elements
  const float* zeros_;  // a row of the input
  float* forms_;
};

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
