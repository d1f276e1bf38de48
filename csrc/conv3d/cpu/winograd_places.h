// SPDX-License-Identifier: Apache-2.0
//
// Where the vectors of some tile rows lie in a line of forms, and where their lanes go in a channel of the output: each
// vector in one tile row, or two short ones in a vector, or one vector after another over all columns with the zeros
// between, whichever has the fewest lanes idle.
#pragma once

#include "conv3d/cpu/winograd_forms.h"
#include "cpu/buffer.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

/// Lanes of a vector that lie in one tile row.
struct Segment {
  int64_t lane;
  int64_t count;
  int64_t to;      // of the first row, from the first channel of the first example on
  int64_t planes;  // of the output, below each other
  int64_t rows;
};

class Places {
 public:
  Places(const ConvShape& s, const WinogradTiling& tiling, int64_t tile_rows)
      : s_(s),
        tiling_(tiling),
        halves_(2 * s.out[2] <= kLanes && 17 * tiling.pitch > 8 * kLanes),
        whole_rows_(halves_ || s.out[2] > tiling.pitch || 17 * tiling.pitch > 16 * whole_vectors(s.out[2])),
        at_(most_vectors(tile_rows)),
        segment_(most_vectors(tile_rows) + 1),
        segments_(most_vectors(tile_rows) + tile_rows) {}

  /// Those of tile rows [first, last).
  void find(int64_t first, int64_t last) {
    count_ = 0;
    segment_.get()[0] = 0;
    const int64_t rows = last - first, length = (rows - 1) * tiling_.pitch + s_.out[2];
    if (!whole_rows_) {
      for (int64_t at = 0; at < length; at += kLanes) add_lanes(at, first, last);
    } else if (halves_) {
      for (int64_t r = 0; r < rows; r += 2) {
        start(r * tiling_.pitch);
        add(first + r, 0, 0, s_.out[2]);
        if (r + 1 < rows) add(first + r + 1, 0, kLanes / 2, s_.out[2]);
      }
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t w = 0; w < s_.out[2]; w += kLanes) {
          start(r * tiling_.pitch + w);
          add(first + r, w, 0, smaller_of(kLanes, s_.out[2] - w));
        }
      }
    }
  }

  int64_t count() const { return count_; }
  int64_t at(int64_t vector) const { return at_.get()[vector]; }
  bool halves() const { return halves_; }  // of which the second lies a pitch behind the first

  /// Calls f(segment) for those of a vector.
  template <class F>
  void each_segment(int64_t vector, const F& f) const {
    for (int64_t k = segment_.get()[vector]; k < segment_.get()[vector + 1]; ++k) f(segments_.get()[k]);
  }

 private:
  int64_t most_vectors(int64_t tile_rows) const {
    return tile_rows * ((larger_of(tiling_.pitch, s_.out[2]) + kLanes - 1) / kLanes);
  }

  void start(int64_t at) {
    at_.get()[count_++] = at;
    segment_.get()[count_] = segment_.get()[count_ - 1];
  }

  void add(int64_t tile_row, int64_t column, int64_t lane, int64_t count) {
    const WinogradTile tile(s_, tiling_, tile_row);
    const int64_t row = (tile.example * s_.outputs * s_.out[0] + tile.plane) * s_.out[1] + tile.row;
    segments_.get()[segment_.get()[count_]++] = {lane, count, row * s_.out[2] + column, tile.planes, tile.rows};
  }

  /// A vector that goes on from one tile row to the next.
  void add_lanes(int64_t at, int64_t first, int64_t last) {
    start(at);
    for (int64_t r = at / tiling_.pitch; first + r < last && r * tiling_.pitch < at + kLanes; ++r) {
      const int64_t begin = r * tiling_.pitch, from = larger_of(at, begin);
      const int64_t count = smaller_of(at + kLanes, begin + s_.out[2]) - from;
      if (count > 0) add(first + r, from - begin, from - at, count);
    }
  }

  const ConvShape& s_;
  const WinogradTiling& tiling_;
  bool halves_;
  bool whole_rows_;
  int64_t count_ = 0;
  Buffer<int64_t> at_;
  Buffer<int64_t> segment_;  // of each vector, the first
  Buffer<Segment> segments_;
};

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
