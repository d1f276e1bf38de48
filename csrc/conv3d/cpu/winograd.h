// SPDX-License-Identifier: Apache-2.0
//
// A convolution of stride 1 by Winograd's F(2, 3), F(4, 3) or F(2, 5) over planes and rows (Lavin and Gray, CVPR 2016):
// of n outputs of an axis and r taps, n + r - 1 products in place of r n. Columns of the kernel are summed as they are,
// and so are planes where the kernel has one.
//
// A tile is the planes × rows of the output that come of one set of products; a tile row, all columns of a tile.
#pragma once

#include <cstdint>

#include "conv3d/problem.h"
#include "math/portable.h"

namespace timm_ext::cpu {

constexpr int64_t kWinogradOutputs = 8;         // channels of the output that are computed together
constexpr int64_t kWinogradCache = 1 << 17;     // elements of the input's forms that stay in a core's cache
constexpr int64_t kWinogradColumns = 96;        // of a unit at least, if it has them, so that weights are seldom read
constexpr int64_t kWinogradPart = 64;           // channels of the output that are worth making the input's forms for
constexpr int64_t kWinogradUnits = 16;          // for several threads
constexpr int64_t kWinogradStreamed = 1 << 21;  // elements of the output that no cache holds until they are read

struct WinogradProblem {
  const ConvShape* shape;  // kernel [1 or r, r, any], r = 3 or 5, stride and dilation 1
  const float* input;      // [examples, inputs, in]
  const float* forms;      // of the weights, by winograd_weights
  const float* bias;       // [outputs], or null for none
  float* output;           // [examples, outputs, out]
  int64_t examples;
  bool streamed;  // past the caches
};

/// Weights [outputs, inputs, 1 or r, r, columns] at these steps; mirrored: the last tap first.
struct WinogradWeights {
  const ConvShape* shape;
  const float* from;
  int64_t output_step;
  int64_t input_step;
  bool mirrored;
  float* forms;
};

/// Sizes of tiles and of units of work, by the sizes of one example alone.
struct WinogradTiling {
  TIMM_EXT_FN explicit WinogradTiling(const ConvShape& s)
      : planes(s.kernel[0] == 1 ? 1 : outputs_of(s.kernel[0], s.out[0])),
        rows(outputs_of(s.kernel[1], s.out[1])),
        plane_forms(planes + s.kernel[0] - 1),
        row_forms(rows + s.kernel[1] - 1),
        row_tiles((s.out[1] + rows - 1) / rows),
        tile_rows((s.out[0] + planes - 1) / planes * row_tiles),
        pitch(s.in[2] + s.padding[2]) {}

  /// Of an axis that are made together: what takes fewer products.
  TIMM_EXT_FN static int64_t outputs_of(int64_t taps, int64_t size) {
    return taps == 3 && 6 * ((size + 3) / 4) < 4 * ((size + 1) / 2) ? 4 : 2;
  }

  TIMM_EXT_FN int64_t forms() const { return plane_forms * row_forms; }

  /// Tile rows of a unit of work: of those from what the cache holds, or is worth reading weights for, up to twice as
  /// many, the number that leaves the fewest lanes idle in the last pair of vectors.
  TIMM_EXT_FN int64_t unit_rows(const ConvShape& s, int64_t examples) const {
    const int64_t cached = kWinogradCache / (forms() * s.inputs * pitch), least = kWinogradColumns / pitch + 1;
    const int64_t wanted = cached > least ? cached : least, all = examples * tile_rows;
    int64_t best = wanted;
    for (int64_t rows = wanted; rows <= 2 * wanted; ++rows) {
      if (pair_lanes(s, rows) * best < pair_lanes(s, best) * rows) best = rows;
    }
    return best < all ? best : all;
  }

  int64_t planes;  // of a tile
  int64_t rows;
  int64_t plane_forms;  // products over planes
  int64_t row_forms;
  int64_t row_tiles;  // tiles over rows
  int64_t tile_rows;  // of an example
  int64_t pitch;      // from a row of forms to the next, whose leading zeros end it

 private:
  /// Of some tile rows in pairs of vectors of 16.
  TIMM_EXT_FN int64_t pair_lanes(const ConvShape& s, int64_t rows) const {
    const int64_t whole = (s.out[2] + 15) / 16 * 16, alone = 2 * s.out[2] <= 16 ? 8 : whole;
    return (rows * (17 * pitch > 16 * alone ? alone : pitch) + 31) / 32 * 32;
  }
};

TIMM_EXT_FN int64_t winograd_blocks(const ConvShape& s) {
  return (s.outputs + kWinogradOutputs - 1) / kWinogradOutputs;
}

/// From a form to the next, an odd number of cache lines: forms are written in turn, and would meet in the same lines.
TIMM_EXT_FN int64_t winograd_form_step(int64_t elements) { return (elements + 15) / 16 / 2 * 32 + 16; }

/// Elements of the weights' forms [blocks of outputs, forms], each [inputs, columns of the kernel, outputs of a block].
TIMM_EXT_FN int64_t winograd_weight_form(const ConvShape& s) {
  return winograd_form_step(s.inputs * s.kernel[2] * kWinogradOutputs);
}
TIMM_EXT_FN int64_t winograd_block_elements(const ConvShape& s) {
  return WinogradTiling(s).forms() * winograd_weight_form(s);
}

/// Units of work: some tile rows × a part of the outputs.
struct WinogradUnits {
  TIMM_EXT_FN explicit WinogradUnits(const WinogradProblem& p)
      : rows(WinogradTiling(*p.shape).unit_rows(*p.shape, p.examples)),
        all_rows(p.examples * WinogradTiling(*p.shape).tile_rows),
        groups((all_rows + rows - 1) / rows),
        parts(parts_of(p.shape->outputs, groups)),
        part_blocks((winograd_blocks(*p.shape) + parts - 1) / parts) {}

  TIMM_EXT_FN static int64_t parts_of(int64_t outputs, int64_t groups) {
    const int64_t most = outputs / kWinogradPart, wanted = (kWinogradUnits + groups - 1) / groups;
    return most < 1 ? 1 : most < wanted ? most : wanted;
  }

  TIMM_EXT_FN int64_t count() const { return groups * parts; }

  int64_t rows;  // of a group
  int64_t all_rows;
  int64_t groups;
  int64_t parts;
  int64_t part_blocks;  // of outputs
};

}  // namespace timm_ext::cpu
