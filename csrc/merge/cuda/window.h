// SPDX-License-Identifier: Apache-2.0
//
// The segments of a warp's tile in shared memory.
#pragma once

#include "math/exp.h"
#include "merge/cuda/tile.h"

namespace timm_ext::cuda {

/// Consecutive segments of the warp's tile: where each ends and its weights. It holds all segments of a row of kRow
/// elements, however short they are. Positions are relative to the tile; an end behind the tile reads `length + 1`.
template <class Compute, int kModels, int kRow>
struct Window {
  static constexpr int kSlots = kRow + 1;  // the last one stands for what lies behind P

  int* ends;         // [kSlots]
  Compute* weights;  // [kSlots, kModels]; models beyond T have weight 0
  int lane;
  int length;     // elements of the tile
  int64_t start;  // of the tile
  int64_t first;  // segment 0 of the window
  int count;
  int cursor;  // the segment of the first element that is not done yet; `count` when the window ends before it

  __device__ __forceinline__ void enter(int64_t tile_start, int tile_length) {
    start = tile_start;
    length = tile_length;
    count = 0;
  }

  /// Loads what is missing of the row that ends at `row_end`; all lanes call it.
  __device__ __forceinline__ void cover(const MergeInputs& in, int row_end) {
    if (count > 0 && ends[count - 1] >= row_end) return;
    load(in, count == 0 ? find_segment(in.offsets, in.segments, start, lane) : first + cursor);
  }

  /// The segment of an element of the row; `count` behind P.
  __device__ __forceinline__ int segment_of(int position) const {
    int low = cursor;
    int high = count;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (ends[middle] <= position) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

 private:
  __device__ __forceinline__ const Compute* log_weights(const MergeInputs& in, int64_t segment) const {
    return static_cast<const Compute*>(in.log_weight) + segment * in.models;
  }

  __device__ __forceinline__ void load(const MergeInputs& in, int64_t segment) {
    __syncwarp();  // until all lanes are done with the window before
    first = segment;
    cursor = 0;
    count = 0;
    uint32_t used = kAllLanes;
    for (int base = 0; base < kRow && used == kAllLanes; base += kWarp) used = load_warp(in, base);
    if (lane < kModels) weights[count * kModels + lane] = 1;
    if (lane == 0) ends[count] = INT32_MAX;
    __syncwarp();
  }

  /// 32 segments, as far as they begin in the tile. Returns which lanes found one.
  __device__ __forceinline__ uint32_t load_warp(const MergeInputs& in, int base) {
    const int64_t own = first + base + lane;
    const bool is_used = base + lane == 0 || (own < in.segments && in.offsets[own] < start + length);
    const uint32_t used = __ballot_sync(kAllLanes, is_used);
    double maximum = 0;
    if (is_used) {
      const int64_t end = in.offsets[own + 1] - start;
      ends[base + lane] = end <= length ? static_cast<int>(end) : length + 1;
      maximum = math::row_maximum(log_weights(in, own), in.models);
    }
    TIMM_EXT_NO_UNROLL
    for (int i = lane; i < kWarp * kModels; i += kWarp) {
      const int s = i / kModels;
      const int t = i % kModels;
      const double row_maximum = __shfl_sync(kAllLanes, maximum, s);
      if (!(used >> s & 1)) continue;
      weights[base * kModels + i] =
          t < in.models ? math::relative_weight<Compute>(log_weights(in, first + base + s)[t], row_maximum) : Compute{};
    }
    count += __popc(used);
    return used;
  }
};

}  // namespace timm_ext::cuda
