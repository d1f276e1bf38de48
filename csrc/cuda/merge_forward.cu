// SPDX-License-Identifier: Apache-2.0
#include "merge.h"
#include "merge_dispatch.h"
#include "merge_general.h"
#include "merge_tile.h"

namespace timm_ext::cuda {
namespace {

/// merged[p] = θ*_p, one warp per tile.
template <Element kElement, int kModels, bool kFisher>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ MergeInputs in, Tiling tiling, bool vectors, void* merged) {
  using Compute = typename Storage<kElement>::Compute;
  using P = Planes<kElement, kModels, kFisher>;
  constexpr int kRow = kWarp * P::kSize;
  TIMM_EXT_SHARED(int, ends, kThreads);
  TIMM_EXT_SHARED(Compute, weights, kThreads * kModels);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  Window<Compute, kModels> window = {};
  window.ends = ends + warp * kWarp;
  window.weights = weights + warp * kWarp * kModels;
  window.lane = lane;

  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp; tile < tiling.tiles; tile += stride) {
    window.enter(in, tiling, tile);
    for (int row = 0; row < window.length; row += kRow) {
      const int own = row + lane * P::kSize;
      const int row_end = row + kRow < window.length ? row + kRow : window.length;
      P planes;
      planes.load(in, window.start + own, window.length - own, vectors);
      typename P::Vector out = {};
      for (int begin = row;;) {  // once, or more often when a row holds more segments than the window
        const int end = window.end() < row_end ? window.end() : row_end;
        int segment = window.cursor;
        TIMM_EXT_UNROLL
        for (int i = 0; i < P::kSize; ++i) {
          if (own + i < begin || own + i >= end) continue;
          segment = window.advance(segment, own + i);
          const PackedElement<P, Compute, kFisher> element = {planes, window.weights + segment * kModels, i};
          out.set(i, math::merged_value(math::merge<Compute>(element, kModels)));
        }
        window.cursor = window.advance(window.cursor, end);
        begin = end;
        if (end >= row_end || !window.next(in)) break;
      }
      typename P::Bits* const address = static_cast<typename P::Bits*>(merged) + window.start + own;
      if (vectors && window.length - own >= P::kSize) {
        out.store(address);
      } else {
        out.store_some(address, window.length - own);
      }
    }
  }
}

}  // namespace

int merge_forward(const MergeInputs& in, void* merged, void* stream) {
  if (in.elements == 0) return 0;
  if (!packed(in)) return merge_forward_general(in, merged, stream);
  return with_packed(in, [&](auto element, auto models, auto fisher) {
    using P = Planes<element(), models(), fisher()>;
    const bool vectors = planes_aligned<P>(in) && aligned(merged, 0, 1, sizeof(typename P::Vector));
    const Tiling tiling = tiling_of(in.elements, kWarp * P::kSize);
    return launch(forward_kernel<element(), models(), fisher()>, grid_size(tiling.tiles, kWarps), kThreads, stream, in,
                  tiling, vectors, merged);
  });
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace timm_ext::cuda
