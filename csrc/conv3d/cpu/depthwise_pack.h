// SPDX-License-Identifier: Apache-2.0
//
// A channel taken apart into its phases, zero-padded, some planes at a time.
#pragma once

#include <cstring>

#include "conv3d/cpu/depthwise.h"
#include "cpu/lanes.h"
#include "math/shuffle.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

class DepthwisePack {
 public:
  /// Of channels that end at `end`.
  DepthwisePack(const DepthwiseLayout& layout, const float* end, float* memory)
      : l_(layout), end_(end), memory_(memory) {
    std::memset(memory + l_.packed_elements() - kDepthwiseColumns, 0, kDepthwiseColumns * sizeof(float));
  }

  /// The planes of a chunk, of the channel that begins at `from`.
  void fill(const float* from, int64_t chunk) const {
    float* to = memory_;
    for (int64_t p = 0; p < l_.phase_count[0]; ++p) {
      for (int64_t r = 0; r < l_.phase_count[1]; ++r) {
        for (int64_t c = 0; c < l_.phase_count[2]; ++c, to += l_.phase_elements()) {
          fill_phase(from, chunk * l_.chunk, {&l_.phases[0][p], &l_.phases[1][r], &l_.phases[2][c]}, to);
        }
      }
    }
  }

  const float* get() const { return memory_; }

 private:
  struct Phases {
    const DepthwisePhase* plane;
    const DepthwisePhase* row;
    const DepthwisePhase* column;
  };

  void fill_phase(const float* from, int64_t first_plane, const Phases& at, float* to) const {
    for (int64_t plane = first_plane; plane < first_plane + l_.planes; ++plane, to += l_.rows * l_.columns) {
      if (plane < at.plane->first || plane >= at.plane->last) {
        std::memset(to, 0, l_.rows * l_.columns * sizeof(float));
        continue;
      }
      fill_plane(from + (at.plane->start + l_.step[0] * plane) * l_.in[1] * l_.in[2], at, to);
    }
  }

  void fill_plane(const float* from, const Phases& at, float* to) const {
    const int64_t first = at.row->first, last = at.row->last;
    std::memset(to, 0, first * l_.columns * sizeof(float));
    for (int64_t row = first; row < last; ++row) {
      fill_row(from + (at.row->start + l_.step[1] * row) * l_.in[2], *at.column, to + row * l_.columns);
    }
    std::memset(to + last * l_.columns, 0, (l_.rows - last) * l_.columns * sizeof(float));
  }

  /// In whole vectors, whose last elements the next row covers.
  void fill_row(const float* from, const DepthwisePhase& at, float* to) const {
    for (int64_t j = 0; j < at.first; j += kLanes) math::store(to + j, V{});
    const int64_t count = at.last - at.first;
    if (count > 0) copy(from + at.start + l_.step[2] * at.first, count, to + at.first);
    for (int64_t j = at.last; j < l_.columns; j += kLanes) math::store(to + j, V{});
  }

  /// Some elements, `step[2]` apart.
  void copy(const float* from, int64_t count, float* to) const {
    const int64_t step = l_.step[2], vectors = whole_vectors(count);
    if (step <= 2 && end_ - from >= step * vectors) {
      for (int64_t j = 0; j < vectors; j += kLanes)
        math::store(to + j, step == 1 ? math::load<V>(from + j) : even(from + 2 * j));
    } else {
      for (int64_t j = 0; j < count; ++j) to[j] = from[step * j];
    }
  }

  static V even(const float* from) {
    V even, odd;
    math::take_apart(math::load<V>(from), math::load<V>(from + kLanes), even, odd);
    return even;
  }

  const DepthwiseLayout& l_;
  const float* end_;
  float* memory_;
};

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
