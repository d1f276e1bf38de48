// SPDX-License-Identifier: Apache-2.0
//
// How the merge kernels cut the flat buffer. One warp owns one tile of consecutive elements; a tile is a number of
// rows, a row is one pack per lane. The cut depends on P, T and the element type only, so the order of every sum does.
#pragma once

#include "cuda/launch.h"
#include "merge/cuda/launchers.h"

namespace timm_ext::cuda {

constexpr int kWarps = 4;  // per block
constexpr int kThreads = kWarps * kWarp;

struct Tiling {
  int length;     // elements of a tile
  int64_t tiles;  // ceil(P / length)

  __device__ __forceinline__ int64_t first_of_warp() const {
    return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  }
  __device__ __forceinline__ int64_t stride() const { return static_cast<int64_t>(gridDim.x) * kWarps; }
};

/// Tiles so short that the last ones do not keep the GPU waiting, and so long that entering one does not count.
inline Tiling tiling_of(int64_t elements, int row) {
  constexpr int64_t kTiles = 16384;
  const int64_t wanted = (elements + kTiles * row - 1) / (kTiles * row);
  const int rows = static_cast<int>(wanted < 4 ? 4 : wanted > 16 ? 16 : wanted);
  return {rows * row, (elements + rows * row - 1) / (rows * row)};
}

/// The last segment that starts at or before `position`: a 33-ary search by the whole warp, one read per lane and step.
/// A stored map from tiles to segments would save at most three of these reads, all of which wait beside the tile's
/// first loads of θ and F, and would have to be kept in step with offsets that live on the device.
__device__ __forceinline__ int64_t find_segment(const int64_t* offsets, int64_t segments, int64_t position, int lane) {
  int64_t first = 0;
  int64_t count = segments;
  while (count > 1) {
    const int64_t step = (count + kWarp - 1) / kWarp;
    const int64_t probe = lane * step;
    const bool reached = lane == 0 || (probe < count && offsets[first + probe] <= position);
    const int64_t skipped = (__popc(__ballot_sync(kAllLanes, reached)) - 1) * step;
    first += skipped;
    count = count - skipped < step ? count - skipped : step;
  }
  return first;
}

}  // namespace timm_ext::cuda
