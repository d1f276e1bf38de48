// SPDX-License-Identifier: Apache-2.0
//
// The way of a warp through its tiles, common to the packed kernels. What a kernel does on it is its Body: one function
// element(i, inputs, merge) for element i of the lane's pack, and what it needs of `Steps`.
#pragma once

#include "merge/cuda/packs.h"
#include "merge/cuda/window.h"

namespace timm_ext::cuda {

/// The steps that a kernel need not take part in.
struct Steps {
  /// The lane goes to the elements from `position` on, of which `count` exist.
  __device__ __forceinline__ void load(int64_t /*position*/, int64_t /*count*/) {}
  template <class W>
  __device__ __forceinline__ void begin_tile(int64_t /*tile*/, const W& /*window*/) {}
  /// crossing: a segment ends in this row; the same in all lanes.
  template <class W>
  __device__ __forceinline__ void begin_row(bool /*crossing*/, const W& /*window*/) {}
  /// The element before was the last of this segment of the window.
  __device__ __forceinline__ void end_segment(int /*segment*/) {}
  __device__ __forceinline__ void end_row(bool /*crossing*/, int64_t /*position*/, int64_t /*count*/) {}
  template <class W>
  __device__ __forceinline__ void end_tile(const W& /*window*/) {}
};

/// One row; `own` is the position of the lane's pack.
template <class P, class W, class Body>
__device__ __forceinline__ void walk_row(const P& packs, W& window, int own, bool crossing, Body& body) {
  using Compute = typename P::Compute;
  constexpr int kModels = P::kModelCount;
  Compute weights[kModels];
  const auto enter = [&](int segment) {
    TIMM_EXT_UNROLL
    for (int t = 0; t < kModels; ++t) weights[t] = window.weights[segment * kModels + t];
    return window.ends[segment];
  };
  const auto element = [&](int i) {
    const PackedElement<P> inputs = {packs, weights, i};
    body.element(i, inputs, math::merge<Compute>(inputs, kModels));
  };
  if constexpr (kModels <= 8) {  // with more models, the look for an end at each element does not count
    if (!crossing) {
      enter(window.cursor);
      TIMM_EXT_UNROLL
      for (int i = 0; i < P::kSize; ++i) element(i);
      return;
    }
  }
  int segment = window.segment_of(own);
  int end = enter(segment);
  TIMM_EXT_UNROLL
  for (int i = 0; i < P::kSize; ++i) {
    element(i);
    if (own + i + 1 != end) continue;
    body.end_segment(segment++);
    if (i + 1 < P::kSize) end = enter(segment);
  }
  window.cursor = __shfl_sync(kAllLanes, segment, kWarp - 1);
}

template <class P, class Body>
__device__ __forceinline__ void walk(const MergeInputs& in, const Tiling& tiling, bool vectors, Body& body) {
  using W = Window<typename P::Compute, P::kModelCount, P::kRow>;
  TIMM_EXT_SHARED(int, ends, kWarps* W::kSlots);
  TIMM_EXT_SHARED(typename P::Compute, weights, kWarps * W::kSlots * P::kModelCount);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  W window = {};
  window.ends = ends + warp * W::kSlots;
  window.weights = weights + warp * W::kSlots * P::kModelCount;
  window.lane = lane;

  for (int64_t tile = tiling.first_of_warp(); tile < tiling.tiles; tile += tiling.stride()) {
    const int64_t start = tile * tiling.length;
    const int length = static_cast<int>(in.elements - start < tiling.length ? in.elements - start : tiling.length);
    window.enter(start, length);
    for (int row = 0; row < length; row += P::kRow) {
      const int own = row + lane * P::kSize;
      const int row_end = row + P::kRow < length ? row + P::kRow : length;
      P packs;
      packs.load(in, start + own, length - own, vectors);  // on its way while the warp looks for the segments
      body.load(start + own, length - own);
      window.cover(in, row_end);
      if (row == 0) body.begin_tile(tile, window);
      const bool crossing = window.ends[window.cursor] <= row_end;
      body.begin_row(crossing, window);
      walk_row(packs, window, own, crossing, body);
      body.end_row(crossing, start + own, length - own);
    }
    body.end_tile(window);
  }
}

}  // namespace timm_ext::cuda
