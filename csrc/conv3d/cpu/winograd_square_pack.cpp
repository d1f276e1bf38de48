// SPDX-License-Identifier: Apache-2.0
//
// The forms of grad and input: rows of channels are turned into rows of lanes, whose forms over planes and rows are
// made first, then those over columns.
#include <cstring>

#include "conv3d/cpu/kernels.h"
#include "conv3d/cpu/row_forms.h"
#include "cpu/buffer.h"
#include "cpu/lanes.h"
#include "math/shuffle.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int64_t kWindow = kSquareTileWindow;

/// What one side's points of a tile are, and how its forms are made of them.
struct GradSide {
  static constexpr int64_t kPoints = 2;  // of an axis of a tile

  template <class C>
  static TIMM_EXT_FN void forms(const C (&g)[2], C (&to)[4]) {
    to[0] = g[0];
    to[1] = g[0] + g[1];
    to[2] = g[0] - g[1];
    to[3] = -g[1];
  }
};

struct InputSide {
  static constexpr int64_t kPoints = kWindow;

  template <class C>
  static TIMM_EXT_FN void forms(const C (&x)[4], C (&to)[4]) {
    input_factors(x, to);
  }
};

/// A tensor of one example and its channels, [channels, size], of which `padding` zeros lie in front on each axis.
struct Volume {
  const float* from;
  int64_t channels;
  const int64_t* size;
  int64_t padding[3];
};

/// Rows [columns, lanes] of a block of channels.
class BlockRows {
 public:
  BlockRows(const Volume& volume, int64_t columns, const float* zeros)
      : volume_(volume),
        columns_(columns),
        first_(smaller_of(volume.padding[2], columns)),
        last_(larger_of(first_, smaller_of(volume.padding[2] + volume.size[2], columns))),
        zeros_(zeros) {}

  void read(int64_t plane, int64_t row, float* to) const {
    const int64_t d = plane - volume_.padding[0], h = row - volume_.padding[1];
    const bool there = d >= 0 && d < volume_.size[0] && h >= 0 && h < volume_.size[1];
    const int64_t channel = volume_.size[0] * volume_.size[1] * volume_.size[2];
    const float* const at = there ? volume_.from + (d * volume_.size[1] + h) * volume_.size[2] : zeros_;
    const float* from[kSquareLanes];
    for (int64_t c = 0; c < kSquareLanes; ++c) from[c] = there && c < volume_.channels ? at + c * channel : zeros_;
    std::memset(to, 0, first_ * kSquareLanes * sizeof(float));
    transpose(from, last_ - first_, to + first_ * kSquareLanes);
    std::memset(to + last_ * kSquareLanes, 0, (columns_ - last_) * kSquareLanes * sizeof(float));
  }

 private:
  /// to[point, lane] = from[lane][point].
  void transpose(const float* const (&from)[kSquareLanes], int64_t points, float* to) const {
    int64_t q = 0;
    const int64_t ahead = 2 * volume_.size[2];  // rows of the next line
#if defined(__AVX512F__)
    for (; q + kSquareLanes <= points; q += kSquareLanes) {
      V lanes[kSquareLanes];
      for (int k = 0; k < kSquareLanes; ++k) {
        __builtin_prefetch(from[k] + q + ahead);
        lanes[k] = math::load<V>(from[k] + q);
      }
      math::transpose(lanes);
      for (int k = 0; k < kSquareLanes; ++k) math::store(to + (q + k) * kSquareLanes, lanes[k]);
    }
#endif
    for (int64_t lane = 0; lane < kSquareLanes; lane += 4) {
      transpose_four(from + lane, q, points, ahead, to + lane);
    }
  }

  /// Four channels at a time, since channels often lie a multiple of a cache's size apart, where it holds eight lines.
  static void transpose_four(const float* const* from, int64_t first, int64_t points, int64_t ahead, float* to) {
    int64_t q = first;
    for (; q + 4 <= points; q += 4) {
      if (q % kSquareLanes == 0) {
        for (int k = 0; k < 4; ++k) __builtin_prefetch(from[k] + q + ahead);
      }
      math::FloatQuad four[4];
      for (int k = 0; k < 4; ++k) four[k] = math::load<math::FloatQuad>(from[k] + q);
      math::transpose(four);
      for (int k = 0; k < 4; ++k) math::store(to + (q + k) * kSquareLanes, four[k]);
    }
    for (; q < points; ++q) {
      for (int k = 0; k < 4; ++k) to[q * kSquareLanes + k] = from[k][q];
    }
  }

  const Volume& volume_;
  int64_t columns_;
  int64_t first_;  // column that is not padding
  int64_t last_;   // one beyond
  const float* zeros_;
};

/// Makes the forms of lines of a block, of one side.
template <class Side>
class Packer {
 public:
  static constexpr int64_t kPoints = Side::kPoints;
  static constexpr int64_t kTiles = 8;  // whose forms over planes and rows stay in the first cache
  static constexpr int64_t kFormRow = (2 * kTiles + kPoints - 2) * kSquareLanes;

  explicit Packer(const ConvShape& s, const WinogradSquareLayout& layout)
      : layout_(layout),
        columns_(2 * layout.tiles + kPoints - 2),
        planes_(layout.depth == 2 ? kPoints : 1),
        memory_(zeros(s) + planes_ * kPoints * row() + layout.plane_forms() * kSquareForms * kFormRow) {
    std::memset(memory_.get(), 0, zeros(s) * sizeof(float));
    rows_ = memory_.get() + zeros(s);
    forms_ = rows_ + planes_ * kPoints * row();
  }

  /// The lines [first, last) of an example, their forms at `to`; a row of the line before serves again.
  void pack(const Volume& volume, int64_t first, int64_t last, float* to) const {
    const BlockRows from(volume, columns_, memory_.get());
    for (int64_t line = first; line < last; ++line, to += layout_.line()) {
      const int64_t d = line / layout_.rows, h = line % layout_.rows;
      const float* rows[kWindow * kWindow];
      for (int64_t plane = 0; plane < planes_; ++plane) {
        for (int64_t at = 0; at < kPoints; ++at) {
          float* const place = rows_ + (plane * kPoints + (2 * h + at) % kPoints) * row();
          const bool known = at + 2 < kPoints && h > 0 && line > first;
          if (!known) from.read(layout_.depth * d + plane, 2 * h + at, place);
          rows[plane * kPoints + at] = place;
        }
      }
      for (int64_t tile = 0; tile < layout_.tiles; tile += kTiles) {
        make_forms(rows, tile, smaller_of(kTiles, layout_.tiles - tile), to + tile * kSquareLanes);
      }
    }
  }

 private:
  static int64_t zeros(const ConvShape& s) { return whole_vectors(larger_of(s.in[2], s.out[2])); }
  int64_t row() const { return columns_ * kSquareLanes + kSquareFormGap; }

  void make_forms(const float* const* rows, int64_t first_tile, int64_t tiles, float* to) const {
    const int64_t first = 2 * first_tile * kSquareLanes, count = (2 * tiles + kPoints - 2) * kSquareLanes;
    layout_.depth == 2 ? make_row_forms<2>(rows, first, count) : make_row_forms<1>(rows, first, count);
    for (int64_t form = 0; form < layout_.plane_forms() * kSquareForms; ++form) {
      make_column_forms(forms_ + form * kFormRow, tiles, to + form * kSquareForms * layout_.form());
    }
  }

  template <int Depth>
  void make_row_forms(const float* const* rows, int64_t first, int64_t count) const {
    constexpr int64_t planes = Depth == 2 ? kPoints : 1, plane_forms = Depth == 2 ? kSquareForms : 1;
    for (int64_t place = 0; place < count; place += kLanes) {
      V over_rows[planes][kSquareForms];
      for (int64_t d = 0; d < planes; ++d) {
        V points[kPoints];
        for (int64_t h = 0; h < kPoints; ++h) points[h] = math::load<V>(rows[d * kPoints + h] + first + place);
        Side::forms(points, over_rows[d]);
      }
      for (int64_t h = 0; h < kSquareForms; ++h) {
        V over_planes[plane_forms];
        if constexpr (Depth == 2) {
          V points[kPoints];
          for (int64_t d = 0; d < kPoints; ++d) points[d] = over_rows[d][h];
          Side::forms(points, over_planes);
        } else {
          over_planes[0] = over_rows[0][h];
        }
        for (int64_t d = 0; d < plane_forms; ++d) {
          math::store(forms_ + (d * kSquareForms + h) * kFormRow + place, over_planes[d]);
        }
      }
    }
  }

  void make_column_forms(const float* from, int64_t tiles, float* to) const {
    const int64_t step = layout_.form();
    for (int64_t tile = 0; tile < tiles; ++tile, from += 2 * kSquareLanes, to += kSquareLanes) {
      for (int64_t lane = 0; lane < kSquareLanes; lane += kLanes) {
        V points[kPoints], forms[kSquareForms];
        for (int64_t w = 0; w < kPoints; ++w) points[w] = math::load<V>(from + w * kSquareLanes + lane);
        Side::forms(points, forms);
        for (int64_t k = 0; k < kSquareForms; ++k) math::store(to + k * step + lane, forms[k]);
      }
    }
  }

  const WinogradSquareLayout& layout_;
  int64_t columns_;
  int64_t planes_;  // of the points of a tile
  Buffer<float> memory_;
  float* rows_;   // [planes, rows of a tile, columns, lanes]
  float* forms_;  // [plane forms, row forms, columns of some tiles, lanes]
};

/// The lines [first, last), counted through all examples, of a block of one side.
template <class Side>
void pack_lines(const Packer<Side>& packer, const WinogradSquareLayout& layout, const Volume& volume, int64_t example,
                int64_t first, int64_t last, float* to) {
  const int64_t lines = layout.lines();
  for (int64_t line = first, end = 0; line < last; line = end) {
    end = smaller_of(last, (line / lines + 1) * lines);
    Volume one = volume;
    one.from += line / lines * example;
    packer.pack(one, line % lines, line % lines + end - line, to + (line - first) * layout.line());
  }
}

}  // namespace

void winograd_square_pack(const WinogradSquareProblem& p, int64_t first_unit, int64_t last_unit) {
  const ConvShape& s = *p.shape;
  const WinogradSquareLayout& layout = *p.layout;
  const Packer<GradSide> grad(s, layout);
  const Packer<InputSide> input(s, layout);
  const int64_t out = s.out[0] * s.out[1] * s.out[2], in = s.in[0] * s.in[1] * s.in[2], channels = kSquareLanes;
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t first = p.first_line + unit / p.blocks() * kPackedLines;
    const int64_t last = smaller_of(first + kPackedLines, p.last_line), place = (first - p.first_line) * layout.line();
    int64_t block = unit % p.blocks();
    if (block < layout.grad_blocks) {
      const Volume volume{p.grad + block * channels * out, s.outputs - block * channels, s.out, {0, 0, 0}};
      pack_lines(grad, layout, volume, p.grad_example, first, last, p.packed_grad + block * layout.block() + place);
    } else {
      block -= layout.grad_blocks;
      const Volume volume{p.input + block * channels * in,
                          s.inputs - block * channels,
                          s.in,
                          {s.padding[0], s.padding[1], s.padding[2]}};
      pack_lines(input, layout, volume, p.input_example, first, last, p.packed_input + block * layout.block() + place);
    }
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
