// SPDX-License-Identifier: Apache-2.0
#include "merge/cuda/stitch.h"

namespace timm_ext::cuda {
namespace {

constexpr int kStitchWarps = 8;
constexpr int kStitchThreads = kStitchWarps * kWarp;
constexpr int64_t kLongChain = 256;  // tiles from which on the whole block adds up one segment

/// The tiles behind `boundary` that the segment opened just before it goes on into; 0 when there is none.
__device__ int64_t chain_length(const MergeInputs& in, const Edges& edges, const Tiling& tiling, int64_t boundary) {
  if (boundary >= tiling.tiles) return 0;
  const int64_t segment = edges.first_segment[boundary];
  const int64_t start = in.offsets[segment];
  const bool opened_before = start < boundary * tiling.length && start >= (boundary - 1) * tiling.length;
  if (!opened_before) return 0;
  const int64_t last = (in.offsets[segment + 1] - 1) / tiling.length;
  return (last < tiling.tiles ? last : tiling.tiles - 1) - boundary + 1;
}

/// Σ head[boundary + i] over i = first, first + step, … below `count`.
__device__ double sum_heads(const double* head, int64_t boundary, int64_t count, int first, int step) {
  double sum = 0;
  for (int64_t i = first; i < count; i += step) sum += head[boundary + i];
  return sum;
}

/// One warp per tile boundary; chains of many tiles are added up by the whole block, one after another.
template <class Compute>
__global__ void __launch_bounds__(kStitchThreads)
    stitch_kernel(const __grid_constant__ MergeInputs in, Edges edges, Tiling tiling, Compute* rows) {
  TIMM_EXT_SHARED(int64_t, lengths, kStitchWarps);
  TIMM_EXT_SHARED(double, partial, kStitchWarps);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t tiles = tiling.tiles;

  for (int64_t base = 1 + static_cast<int64_t>(blockIdx.x) * kStitchWarps; base < tiles;
       base += static_cast<int64_t>(gridDim.x) * kStitchWarps) {
    const int64_t boundary = base + warp;
    const int64_t length = chain_length(in, edges, tiling, boundary);
    if (length > 0 && length < kLongChain) {
      const int64_t row = edges.first_segment[boundary] * in.models;
      for (int64_t t = 0; t < in.models; ++t) {
        const double sum = warp_sum(sum_heads(edges.head + t * tiles, boundary, length, lane, kWarp));
        if (lane == 0) rows[row + t] = static_cast<Compute>(edges.tail[t * tiles + boundary - 1] + sum);
      }
    }
    if (lane == 0) lengths[warp] = length;
    __syncthreads();
    for (int w = 0; w < kStitchWarps; ++w) {
      if (lengths[w] < kLongChain) continue;
      const int64_t row = edges.first_segment[base + w] * in.models;
      for (int64_t t = 0; t < in.models; ++t) {
        const double* const head = edges.head + t * tiles;
        const double sum = warp_sum(sum_heads(head, base + w, lengths[w], threadIdx.x, kStitchThreads));
        if (lane == 0) partial[warp] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
          double total = edges.tail[t * tiles + base + w - 1];
          for (int i = 0; i < kStitchWarps; ++i) total += partial[i];
          rows[row + t] = static_cast<Compute>(total);
        }
        __syncthreads();
      }
    }
    __syncthreads();
  }
}

template <class Compute>
int launch_typed(const MergeInputs& in, const Edges& edges, const Tiling& tiling, void* rows, void* stream) {
  return launch(stitch_kernel<Compute>, grid_size(tiling.tiles - 1, kStitchWarps), kStitchThreads, stream, in, edges,
                tiling, static_cast<Compute*>(rows));
}

}  // namespace

int launch_stitch(const MergeInputs& in, const Edges& edges, const Tiling& tiling, void* rows, void* stream) {
  if (tiling.tiles < 2) return 0;
  if (in.element == Element::kFloat64) return launch_typed<double>(in, edges, tiling, rows, stream);
  return launch_typed<float>(in, edges, tiling, rows, stream);
}

}  // namespace timm_ext::cuda
