// SPDX-License-Identifier: Apache-2.0
#include "merge.h"
#include "merge_dispatch.h"
#include "merge_general.h"
#include "merge_stitch.h"

namespace timm_ext::cuda {
namespace {

/// The state of one lane while it walks over its elements of a tile.
template <class Compute, int kModels>
struct LaneSums {
  Compute open[kModels];  // of the segment that the last element belongs to
  Compute head[kModels];  // of the segment that ended first in this lane and may have begun in lanes before
  int ended;              // that segment's index in the window, or -1

  __device__ __forceinline__ void clear() {
    TIMM_EXT_UNROLL
    for (int t = 0; t < kModels; ++t) open[t] = 0;
  }

  /// Brings what all lanes have of the open segment to lane 0, in front of the elements that come next.
  __device__ __forceinline__ void gather(int lane) {
    ended = -1;
    TIMM_EXT_UNROLL
    for (int t = 0; t < kModels; ++t) {
      const Compute sum = warp_sum(open[t]);
      open[t] = lane == 0 ? sum : Compute{};
      head[t] = 0;
    }
  }

  /// The element just added was the last of `segment`. A second segment that ends in a lane lies wholly in it.
  __device__ __forceinline__ void end_segment(int segment, int64_t first, const TileSums<Compute>& sums) {
    TIMM_EXT_UNROLL
    for (int t = 0; t < kModels; ++t) {
      if (ended < 0) {
        head[t] = open[t];
      } else if (t < sums.models) {
        sums.close(first + segment, t, open[t]);
      }
      open[t] = 0;
    }
    if (ended < 0) ended = segment;
  }

  /// Adds up the segments that cross lanes: a segmented scan whose segments start after each lane where one ended.
  /// Leaves what belongs to the segment still open in the last lane, 0 in the others.
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
      open[t] = lane == kWarp - 1 ? sum : Compute{};
    }
  }
};

/// grad_log_weight rows of segments inside one tile, and the edges of the others; one warp per tile.
template <Element kElement, int kModels, bool kFisher>
__global__ void __launch_bounds__(kThreads, 1)
    backward_kernel(const __grid_constant__ MergeInputs in, MergeGradient gradient, Tiling tiling, bool vectors,
                    Edges edges, void* rows) {
  using Compute = typename Storage<kElement>::Compute;
  using P = Planes<kElement, kModels, kFisher>;
  using Bits = typename P::Bits;
  constexpr int kRow = kWarp * P::kSize;
  TIMM_EXT_SHARED(int, ends, kThreads);
  TIMM_EXT_SHARED(Compute, weights, kThreads * kModels);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  Window<Compute, kModels> window = {};
  window.ends = ends + warp * kWarp;
  window.weights = weights + warp * kWarp * kModels;
  window.lane = lane;
  const Bits* const values = static_cast<const Bits*>(gradient.values);

  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp; tile < tiling.tiles; tile += stride) {
    window.enter(in, tiling, tile);
    TileSums<Compute> sums = {edges, tiling, static_cast<Compute*>(rows), in.models, tile, -1};
    sums.enter(in.offsets, window.first, lane);
    LaneSums<Compute, kModels> lane_sums = {};
    for (int row = 0; row < window.length; row += kRow) {
      const int own = row + lane * P::kSize;
      const int row_end = row + kRow < window.length ? row + kRow : window.length;
      P planes;
      planes.load(in, window.start + own, window.length - own, vectors);
      const typename P::Vector g = gradient.stride ? P::load_pack(values + window.start + own, window.length - own,
                                                                  vectors && window.length - own >= P::kSize)
                                                   : P::Vector::filled(*values);
      for (int begin = row;;) {  // once, or more often when a row holds more segments than the window
        const int end = window.end() < row_end ? window.end() : row_end;
        const bool ending = window.ends[window.cursor] <= end;
        if (ending) lane_sums.gather(lane);
        int segment = window.cursor;
        TIMM_EXT_UNROLL
        for (int i = 0; i < P::kSize; ++i) {
          if (own + i < begin || own + i >= end) continue;
          segment = window.advance(segment, own + i);
          const PackedElement<P, Compute, kFisher> element = {planes, window.weights + segment * kModels, i};
          const math::Merge<Compute> m = math::merge<Compute>(element, kModels);
          TIMM_EXT_UNROLL
          for (int t = 0; t < kModels; ++t) {
            const Compute share = math::merge_share(element, m, t);
            lane_sums.open[t] += g.get(i) * (share * math::merge_offset(element, m, t));
          }
          if (ending && own + i + 1 == window.ends[segment]) lane_sums.end_segment(segment, window.first, sums);
        }
        if (ending) lane_sums.join(lane, window.first, sums);
        window.cursor = window.advance(window.cursor, end);
        begin = end;
        if (end >= row_end || !window.next(in)) break;
      }
    }
    if (window.ends[window.cursor] <= window.length) continue;  // the last segment ended with the tile
    TIMM_EXT_UNROLL
    for (int t = 0; t < kModels; ++t) {
      const Compute sum = warp_sum(lane_sums.open[t]);
      if (lane == 0 && t < in.models) sums.leave(window.first + window.cursor, t, sum);
    }
  }
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
    error = with_packed(in, [&](auto element, auto models, auto fisher) {
      using P = Planes<element(), models(), fisher()>;
      const bool vectors =
          planes_aligned<P>(in) && (!gradient.stride || aligned(gradient.values, 0, 1, sizeof(typename P::Vector)));
      return launch(backward_kernel<element(), models(), fisher()>, grid_size(tiling.tiles, kWarps), kThreads, stream,
                    in, gradient, tiling, vectors, edges, grad_log_weight);
    });
  } else {
    error = merge_backward_general(in, gradient, tiling, edges, grad_log_weight, stream);
  }
  return error ? error : launch_stitch(in, edges, tiling, grad_log_weight, stream);
}

}  // namespace timm_ext::cuda
