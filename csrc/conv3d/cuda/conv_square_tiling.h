// SPDX-License-Identifier: Apache-2.0
//
// How the weight gradient of one example is divided. It is a product of matrices, outputs × columns, summed over
// points; a column is an input channel at a tap. A tile is what a block computes: up to 64 outputs × the columns of
// some units. A unit is an input channel; where the taps of a channel are too many or lie too far apart, a channel at
// single taps of the leading axes. The points are taken in boxes, whose part of grad and of the input (with its halo,
// the "slab") is held in shared memory. The boxes of a tile are divided among several blocks, the slices.
//
// Everything follows from the shape alone: neither the device nor the number of examples changes a bit of a sum.
#pragma once

#include <cstdint>

#include "conv3d/cuda/conv_square.h"
#include "conv3d/problem.h"
#include "math/portable.h"

namespace timm_ext::cuda {

constexpr int kConvThreads = 128;         // of a block, at most
constexpr int kConvOutputs = 8;           // of a thread
constexpr int kConvStep = 4;              // points that a thread takes at a time, along the last axis
constexpr int kConvSharedFloats = 12288;  // 48 KiB, what every GPU gives without being asked

/// Rows of a thread. A row is a column, or ("window" 3) three columns that are neighbours along the last axis and share
/// what is loaded.
TIMM_EXT_FN constexpr int conv_rows(int window) { return window == 3 ? 3 : 7; }

/// Counts (a, b, c, d), d first, in steps of a block's threads; a has no limit.
struct ConvWalk {
  int limit[3];  // of b, c and d
  int step[4];
};

/// ConvShape in 32 bits.
struct ConvSize {
  int outputs, inputs;
  int out[3], in[3];
  int kernel[3], stride[3], padding[3], dilation[3];
};

struct ConvTiling {
  ConvSize size;
  int groups;
  int unit_count;  // of a group
  int output_tiles, unit_tiles;
  int boxes[3];  // along the axes
  int box_count, slices;

  int window;          // 1 or 3
  int output_threads;  // a tile has kConvOutputs times as many outputs
  int lanes;           // threads that share an output
  int threads;         // output_threads · lanes in whole warps

  int outside;  // leading axes whose taps are units of their own
  int taps[3];  // of a unit, a window counting as one
  int rows;     // of a unit
  int units;    // of a tile

  int box[3];         // points, the last a multiple of kConvStep
  int point_step[3];  // places of the slab from point to point
  int tap_step[3];    // from tap to tap
  int input_step[3];  // points of the input from place to place
  int lead;           // places in front of the first tap of the first point
  int extent[3];      // places of a unit
  int line_floats, plane_floats, unit_floats;
  int grad_floats;                   // of an output
  bool input_vectors, grad_vectors;  // whether memory is read four values at a time
  ConvWalk input_walk;               // units, planes, lines, values or vectors
  ConvWalk grad_walk;                // outputs, planes, lines, values or vectors

  TIMM_EXT_FN int tiles() const { return groups * output_tiles * unit_tiles; }
  TIMM_EXT_FN int outputs() const { return kConvOutputs * output_threads; }  // of a tile
  TIMM_EXT_FN int columns() const { return units * rows * window; }          // likewise
  TIMM_EXT_FN int tile_floats() const { return outputs() * columns(); }

  /// Of a box, or of the sums on their way out.
  TIMM_EXT_FN int shared_floats() const {
    const int box_floats = units * unit_floats + outputs() * grad_floats, sums = output_threads * columns();
    return box_floats > sums ? box_floats : sums;
  }
};

ConvTiling conv_tiling(const ConvSquareProblem& problem);

/// How many tiles and examples share the workspace, or a launch where there is none.
struct ConvPasses {
  int tiles, examples;
  ConvPasses(const ConvTiling& tiling, const ConvSquareProblem& problem);
};

}  // namespace timm_ext::cuda
