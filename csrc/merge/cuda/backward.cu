// SPDX-License-Identifier: Apache-2.0
#include "merge/cuda/dispatch.h"
#include "merge/cuda/general.h"
#include "merge/cuda/launchers.h"
#include "merge/cuda/stitch.h"
#include "merge/cuda/walk.h"

namespace timm_ext::cuda {
namespace {

/// The sums of one lane while its warp walks over a tile.
template <class Compute, int kModels>
struct LaneSums {
  Compute open[kModels];  // of the segment that the last element belongs to
  Compute head[kModels];  // of the segment that ended first in this lane and may have begun in lanes before
  int ended;              // that segment's index in the window, or -1
  bool reduced;           // lane 0 holds all of the open segment; the same in all lanes

  __device__ __forceinline__ void clear() {
    reduced = true;
    TIMM_EXT_UNROLL
    for (int t = 0; t < kModels; ++t) open[t] = 0;
  }

  /// Brings what all lanes have of the open segment to lane 0, in front of the elements that come next.
  __device__ __forceinline__ void reduce(int lane) {
    ended = -1;
    TIMM_EXT_UNROLL
    for (int t = 0; t < kModels; ++t) head[t] = 0;
    if (reduced) return;
    TIMM_EXT_UNROLL
    for (int t = 0; t < kModels; ++t) {
      const Compute sum = warp_sum(open[t]);
      open[t] = lane == 0 ? sum : Compute{};
    }
  }

  /// The element just added was the last of `segment`. A second segment that ends in a lane lies wholly in it.
  __device__ __forceinline__ void end_segment(int segment, int64_t first, const TileSums<Compute>& sums) {
    if (ended < 0) {
      ended = segment;
      TIMM_EXT_UNROLL
      for (int t = 0; t < kModels; ++t) head[t] = open[t];
    } else {
      Compute* const row = sums.row(first + segment);
      TIMM_EXT_UNROLL
      for (int t = 0; t < kModels; ++t) {
        if (t < sums.models) row[t] = open[t];
      }
    }
    TIMM_EXT_UNROLL
    for (int t = 0; t < kModels; ++t) open[t] = 0;
  }

  /// Adds up the segments that cross lanes: a segmented scan whose segments start after each lane where one ended.
  /// Leaves what belongs to the segment still open behind the row in lane 0.
  __device__ __forceinline__ void join(int lane, int64_t first, const TileSums<Compute>& sums) {
    const uint32_t ends = __ballot_sync(kAllLanes, ended >= 0) & (kAllLanes >> (kWarp - 1 - lane));
    const int start = ends ? kWarp - 1 - __clz(static_cast<int>(ends)) : 0;
    TIMM_EXT_UNROLL
    for (int t = 0; t < kModels; ++t) {
      Compute sum = open[t];
      TIMM_EXT_UNROLL
      for (int step = 1; step < kWarp; step *= 2) {
        const Compute before = __shfl_up_sync(kAllLanes, sum, step);
        if (lane - step >= start) sum += before;
      }
      const Compute before = __shfl_up_sync(kAllLanes, sum, 1);
      if (ended >= 0 && t < sums.models) sums.close(first + ended, t, lane == 0 ? head[t] : head[t] + before);
      const Compute last = __shfl_sync(kAllLanes, sum, kWarp - 1);
      open[t] = lane == 0 ? last : Compute{};
    }
    reduced = true;
  }
};

/// grad_log_weight rows of segments inside one tile, and the edges of the others.
template <class P>
struct Backward : Steps {
  using Compute = typename P::Compute;
  const MergeInputs& in;
  GradientPack<P> g;
  int lane;
  TileSums<Compute> sums;
  LaneSums<Compute, P::kModelCount> lane_sums;
  int64_t first;  // segment 0 of the window

  __device__ __forceinline__ void load(int64_t position, int64_t count) { g.load(position, count); }
  template <class W>
  __device__ __forceinline__ void begin_tile(int64_t tile, const W& window) {
    sums.enter(in.offsets, tile, window.first, lane);
    lane_sums.clear();
  }
  template <class W>
  __device__ __forceinline__ void begin_row(bool crossing, const W& window) {
    first = window.first;
    if (crossing) lane_sums.reduce(lane);
    if (!crossing) lane_sums.reduced = false;
  }
  template <class E>
  __device__ __forceinline__ void element(int i, const E& inputs, const math::Merge<Compute>& m) {
    TIMM_EXT_UNROLL
    for (int t = 0; t < P::kModelCount; ++t) {
      lane_sums.open[t] += g.get(i) * (math::merge_share(inputs, m, t) * math::merge_offset(inputs, m, t));
    }
  }
  __device__ __forceinline__ void end_segment(int segment) { lane_sums.end_segment(segment, first, sums); }
  __device__ __forceinline__ void end_row(bool crossing, int64_t, int64_t) {
    if (crossing) lane_sums.join(lane, first, sums);
  }
  template <class W>
  __device__ __forceinline__ void end_tile(const W& window) {
    if (window.cursor == window.count) return;  // the last segment ended with the tile
    TIMM_EXT_UNROLL
    for (int t = 0; t < P::kModelCount; ++t) {
      const Compute sum = warp_sum(lane_sums.open[t]);
      if (lane == 0 && t < in.models) sums.leave(window.first + window.cursor, t, sum);
    }
  }
};

template <class P>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ MergeInputs in, const __grid_constant__ MergeGradient gradient,
                    const __grid_constant__ Tiling tiling, bool vectors, bool gradient_vectors,
                    const __grid_constant__ Edges edges, void* rows) {
  using Compute = typename P::Compute;
  const int lane = threadIdx.x % kWarp;
  const TileSums<Compute> sums = {edges, tiling, static_cast<Compute*>(rows), in.models, 0, -1};
  Backward<P> body = {{}, in, {gradient, gradient_vectors, {}}, lane, sums, {}, 0};
  walk<P>(in, tiling, vectors, body);
}

}  // namespace

size_t merge_backward_workspace_bytes(int64_t models, int64_t elements, Element element) {
  MergeInputs in = {};
  in.models = models;
  in.element = element;
  return Edges::bytes(models, tiling_of(elements, row_of(in)).tiles);
}

int merge_backward_log_weight(const MergeInputs& in, const MergeGradient& gradient, void* grad_log_weight,
                              void* workspace, void* stream) {
  if (in.elements == 0) return 0;
  const Tiling tiling = tiling_of(in.elements, row_of(in));
  const Edges edges = Edges::at(workspace, in.models, tiling.tiles);
  int error = 0;
  if (packed(in)) {
    error = with_packed<AllModels>(in, [&](auto* packs) {
      using P = std::remove_pointer_t<decltype(packs)>;
      return launch(backward_kernel<P>, grid_size(tiling.tiles, kWarps), kThreads, stream, in, gradient, tiling,
                    P::aligned_in(in), GradientPack<P>::aligned_in(gradient), edges, grad_log_weight);
    });
  } else {
    error = merge_backward_general(in, gradient, tiling, edges, grad_log_weight, stream);
  }
  return error ? error : launch_stitch(in, edges, tiling, grad_log_weight, stream);
}

}  // namespace timm_ext::cuda
