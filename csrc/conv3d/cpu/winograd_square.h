// SPDX-License-Identifier: Apache-2.0
//
// Weight gradients of convolutions with kernels of 3 × 3 × 3 or 1 × 3 × 3 at stride 1, by Winograd's F(2, 3), turned
// round, on every axis of three taps. On one axis, of two values of grad, g0 and g1, and the input's x0 … x3 there are
// four forms, whose products m0 … m3, summed over all pairs, give the gradients at the three taps: four multiplications
// in place of six.
//     m0 = g0 (x0 − x2)    m1 = (g0 + g1) (x1 + x2)    m2 = (g0 − g1) (x2 − x1)    m3 = −g1 (x1 − x3)
//     m0 + (m1 + m2) / 2,  (m1 − m2) / 2,  (m1 + m2) / 2 + m3
// The sums of each form are one product of matrices, over tiles: pairs of planes, rows and columns.
#pragma once

#include <cstdint>

#include "conv3d/problem.h"
#include "math/portable.h"

namespace timm_ext::cpu {

constexpr int64_t kSquareLanes = 16;      // channels of a block
constexpr int64_t kSquareForms = 4;       // of an axis of three taps
constexpr int64_t kSquareTileWindow = 4;  // points of the input for a tile, on such an axis
constexpr int64_t kSquareFormGap = 80;    // elements between forms: they lie no multiple of a page apart
constexpr int64_t kPackedLines = 4;       // packed one after another

/// Whether this way exists, and pays: of fewer points or channels, the forms take longer to make than they save.
bool serves_winograd_square(const ConvShape&);

/// Where things lie in the packed forms, [blocks of channels, forms, lines, tiles of a line, lanes]. A line holds the
/// tiles along the last axis. With few channels, whose slabs are small, the lines go through in parts with sums of
/// their own, which no thread waits for.
struct WinogradSquareLayout {
  /// Of the lines of some examples together.
  WinogradSquareLayout(const ConvShape&, int64_t examples);

  int64_t depth;   // planes of a tile, 2 or 1
  int64_t planes;  // of tiles
  int64_t rows;    // of tiles
  int64_t tiles;   // of a line
  int64_t grad_blocks;
  int64_t input_blocks;
  int64_t together;  // lines whose sums are one gradient
  int64_t slab;      // lines that are packed at a time
  int64_t parts;     // of the lines together

  TIMM_EXT_FN int64_t lines() const { return planes * rows; }
  TIMM_EXT_FN int64_t plane_forms() const { return depth == 2 ? kSquareForms : 1; }
  TIMM_EXT_FN int64_t forms() const { return plane_forms() * kSquareForms * kSquareForms; }

  TIMM_EXT_FN int64_t line() const { return tiles * kSquareLanes; }
  TIMM_EXT_FN int64_t form() const { return slab * line() + kSquareFormGap; }
  TIMM_EXT_FN int64_t block() const { return forms() * form(); }
  TIMM_EXT_FN int64_t packed_elements() const { return (grad_blocks + input_blocks) * block(); }

  TIMM_EXT_FN int64_t part_line(int64_t part) const { return part * together / parts; }

  /// Elements of the sums, [parts, forms, blocks of grad, blocks of the input, channels, lanes].
  TIMM_EXT_FN int64_t form_sums() const { return grad_blocks * input_blocks * kSquareLanes * kSquareLanes; }
  TIMM_EXT_FN int64_t part_sums() const { return forms() * form_sums(); }
};

/// accumulator[o, i, tap] += scale Σ_points grad · input of some examples, or its square.
struct WinogradSquareProblem {
  const ConvShape* shape;
  const WinogradSquareLayout* layout;
  const float* grad;
  const float* input;
  int64_t grad_example;  // elements from one example to the next
  int64_t input_example;
  float* packed_grad;   // [layout.grad_blocks, layout.block()]
  float* packed_input;  // [layout.input_blocks, layout.block()]
  float* sums;          // [layout.part_sums()], to write [layout.parts, layout.part_sums()]
  float* accumulator;   // [outputs, inputs, taps]
  float scale;
  bool squared;
  int64_t first_line;  // of the slab, counted through all examples
  int64_t last_line;
  bool first_slab;  // what is in the sums does not count

  TIMM_EXT_FN int64_t slab_lines() const { return last_line - first_line; }
  TIMM_EXT_FN int64_t slab_chunks() const { return (slab_lines() + kPackedLines - 1) / kPackedLines; }

  /// Units of work: chunks of lines × blocks of channels of both; forms × pairs of blocks of grad; blocks × blocks.
  TIMM_EXT_FN int64_t blocks() const { return layout->grad_blocks + layout->input_blocks; }
  TIMM_EXT_FN int64_t pack_units() const { return slab_chunks() * blocks(); }
  TIMM_EXT_FN int64_t grad_pairs() const { return (layout->grad_blocks + 1) / 2; }
  TIMM_EXT_FN int64_t add_units() const { return layout->forms() * grad_pairs(); }
  TIMM_EXT_FN int64_t write_units() const { return layout->grad_blocks * layout->input_blocks; }
};

}  // namespace timm_ext::cpu
