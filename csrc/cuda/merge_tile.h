// SPDX-License-Identifier: Apache-2.0
//
// How the merge kernels cut the flat buffer. One warp owns one tile of consecutive elements; a tile is a number of
// rows, a row is one pack per lane. The cut depends on P, T and the element type only, so the order of every sum does.
#pragma once

#include "../math/exp.h"
#include "../math/merge.h"
#include "launch.h"
#include "merge.h"
#include "storage.h"

namespace timm_ext::cuda {

constexpr int kWarps = 4;  // per block
constexpr int kThreads = kWarps * kWarp;

struct Tiling {
  int length;     // elements of a tile
  int64_t tiles;  // ceil(P / length)
};

/// Enough tiles to fill a GPU several times over, but so long that finding the first segment does not count.
inline Tiling tiling_of(int64_t elements, int row) {
  constexpr int64_t kTiles = 16384;
  const int64_t wanted = (elements + kTiles * row - 1) / (kTiles * row);
  const int rows = static_cast<int>(wanted < 4 ? 4 : wanted > 32 ? 32 : wanted);
  return {rows * row, (elements + rows * row - 1) / (rows * row)};
}

/// The last segment that starts at or before `position`: a 33-ary search by the whole warp.
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

/// Up to 32 consecutive segments of the warp's tile: where each ends and its weights, in shared memory.
/// Positions are relative to the tile; an end beyond the tile reads `length + 1`.
template <class Compute, int kModels>
struct Window {
  int* ends;         // [kWarp]
  Compute* weights;  // [kWarp, kModels]; models beyond T have weight 0
  int lane;
  int length;     // elements of this tile that exist
  int64_t start;  // of the tile
  int64_t first;  // segment 0 of the window
  int count;
  int cursor;  // a segment of the window that no unprocessed element lies before

  __device__ __forceinline__ void enter(const MergeInputs& in, const Tiling& tiling, int64_t tile) {
    start = tile * tiling.length;
    length = static_cast<int>(in.elements - start < tiling.length ? in.elements - start : tiling.length);
    load(in, find_segment(in.offsets, in.segments, start, lane));
  }

  __device__ __forceinline__ void load(const MergeInputs& in, int64_t segment) {
    using Log = Compute;
    __syncwarp();  // until all lanes are done with the window before
    first = segment;
    cursor = 0;
    const int64_t own = segment + lane;
    const bool used = lane == 0 || (own < in.segments && in.offsets[own] < start + length);
    count = __popc(__ballot_sync(kAllLanes, used));
    if (used) {
      const int64_t end = in.offsets[own + 1] - start;
      ends[lane] = end <= length ? static_cast<int>(end) : length + 1;
    }
    for (int i = lane; i < count * kModels; i += kWarp) {
      const int t = i % kModels;
      const Log* row = static_cast<const Log*>(in.log_weight) + (segment + i / kModels) * in.models;
      weights[i] =
          t < in.models ? math::relative_weight<Compute>(row[t], math::row_maximum(row, in.models)) : Compute{};
    }
    __syncwarp();
  }

  __device__ __forceinline__ bool next(const MergeInputs& in) {
    if (first + count >= in.segments) return false;
    load(in, first + count);
    return true;
  }

  __device__ __forceinline__ int end() const { return ends[count - 1]; }

  /// The segment of the window that holds `position`, searched from `segment` on.
  __device__ __forceinline__ int advance(int segment, int position) const {
    while (segment + 1 < count && position >= ends[segment]) ++segment;
    return segment;
  }
};

/// Bytes of one load: 16, or 8 where packs of 16 bytes of all planes would not fit the registers.
constexpr int vector_bytes(Element element, int64_t models) {
  return models > 5 && element != Element::kFloat32 ? 8 : 16;
}

/// One pack of θ and F of every model, in registers. Models beyond T repeat model 0 (their weight is 0), so that one
/// kernel serves several T: they change neither the sums nor the hull.
template <Element kElement, int kModels, bool kFisher>
struct Planes {
  using Vector = Pack<kElement, vector_bytes(kElement, kModels)>;
  using Bits = typename Vector::Bits;
  static constexpr int kSize = Vector::kSize;

  Vector theta[kModels];
  Vector fisher[kFisher ? kModels : 1];

  /// `count` elements from `position` on exist, at most kSize of them are wanted.
  __device__ __forceinline__ void load(const MergeInputs& in, int64_t position, int64_t count, bool vectors) {
    const Bits* theta_row = static_cast<const Bits*>(in.theta) + position;
    const Bits* fisher_row = static_cast<const Bits*>(in.fisher) + position;
    const bool whole = vectors && count >= kSize;
    TIMM_EXT_UNROLL
    for (int t = 0; t < kModels; ++t) {
      if (t < in.models) {
        theta[t] = load_pack(theta_row + t * in.theta_stride, count, whole);
        if constexpr (kFisher) fisher[t] = load_pack(fisher_row + t * in.fisher_stride, count, whole);
      } else {
        theta[t] = theta[0];
        if constexpr (kFisher) fisher[t] = fisher[0];
      }
    }
  }

  __device__ __forceinline__ static Vector load_pack(const Bits* address, int64_t count, bool whole) {
    if (whole) return Vector::load(address);
    return Vector::load_some(address, count < kSize ? static_cast<int>(count) : kSize);
  }
};

/// The inputs of element `index` of the packs, as csrc/math/merge.h wants them.
template <class P, class Compute, bool kFisher>
struct PackedElement {
  static constexpr bool kWeighted = kFisher;
  const P& planes;
  const Compute* weights;
  int index;

  __device__ __forceinline__ Compute theta(int t) const { return planes.theta[t].get(index); }
  __device__ __forceinline__ Compute alpha(int t) const { return weights[t]; }
  __device__ __forceinline__ Compute fisher(int t) const {
    return weights[t] == Compute{} ? Compute{} : planes.fisher[t].get(index);
  }
};

/// Whether rows of `stride` elements from `base` on can be read in vectors of `bytes`.
inline bool aligned(const void* base, int64_t stride, int element_bytes, int bytes) {
  return reinterpret_cast<uintptr_t>(base) % bytes == 0 && stride * element_bytes % bytes == 0;
}

}  // namespace timm_ext::cuda
