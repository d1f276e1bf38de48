// SPDX-License-Identifier: Apache-2.0
//
// Sums of segments that lie in more than one tile. The first launch leaves per tile the sum of the segment that was
// open at its start (head) and of the one that was opened in it and is open at its end (tail); the second adds them up
// in float64, in an order that depends on the tiling only.
#pragma once

#include "merge/cuda/tile.h"

namespace timm_ext::cuda {

/// Views of the workspace; slots that no segment needs stay unwritten and unread.
struct Edges {
  int64_t* first_segment;  // [tiles]
  double* head;            // [T, tiles]
  double* tail;            // [T, tiles]

  static size_t bytes(int64_t models, int64_t tiles) { return (1 + 2 * models) * tiles * sizeof(double); }

  static Edges at(void* workspace, int64_t models, int64_t tiles) {
    double* const head = static_cast<double*>(workspace) + tiles;
    return {static_cast<int64_t*>(workspace), head, head + models * tiles};
  }
};

/// Where the sums of one tile go.
template <class Compute>
struct TileSums {
  const Edges& edges;
  const Tiling& tiling;
  Compute* rows;   // grad_log_weight [S, T]
  int64_t models;  // T
  int64_t tile;
  int64_t open;  // the segment that began before the tile, or -1

  /// Enters the tile, whose first element `segment` holds; all lanes call it.
  __device__ __forceinline__ void enter(const int64_t* offsets, int64_t tile_, int64_t segment, int lane) {
    tile = tile_;
    open = offsets[segment] < tile * tiling.length ? segment : -1;
    if (lane == 0) edges.first_segment[tile] = segment;
  }

  /// The sum of a segment whose last element lies in the tile.
  __device__ __forceinline__ void close(int64_t segment, int t, Compute sum) const {
    if (segment == open) {
      edges.head[t * tiling.tiles + tile] = sum;
    } else {
      row(segment)[t] = sum;
    }
  }

  __device__ __forceinline__ Compute* row(int64_t segment) const { return rows + segment * models; }

  /// The sum of a segment that goes on after the tile.
  __device__ __forceinline__ void leave(int64_t segment, int t, Compute sum) const {
    (segment == open ? edges.head : edges.tail)[t * tiling.tiles + tile] = sum;
  }
};

/// Enqueues the second launch; there is nothing to do for a single tile.
int launch_stitch(const MergeInputs& in, const Edges& edges, const Tiling& tiling, void* grad_log_weight, void* stream);

}  // namespace timm_ext::cuda
