// SPDX-License-Identifier: Apache-2.0
#include "merge/cuda/dispatch.h"
#include "merge/cuda/general.h"
#include "merge/cuda/window.h"

namespace timm_ext::cuda {
namespace {

constexpr int kCached = 64;  // weights of a segment kept in shared memory; those of further models are recomputed

/// The part of a segment that lies in the warp's tile, and its weights.
template <class Compute>
struct Piece {
  Compute* cache;  // [kCached], shared memory of the warp
  const Compute* log_weight;
  double row_maximum;
  int64_t segment;
  int64_t begin;
  int64_t end;

  /// Enters the segment; false when it begins after the tile.
  __device__ __forceinline__ bool enter(const MergeInputs& in, int64_t s, int64_t tile_begin, int64_t tile_end,
                                        int lane) {
    if (s >= in.segments || in.offsets[s] >= tile_end) return false;
    segment = s;
    begin = in.offsets[s] > tile_begin ? in.offsets[s] : tile_begin;
    end = in.offsets[s + 1] < tile_end ? in.offsets[s + 1] : tile_end;
    log_weight = static_cast<const Compute*>(in.log_weight) + s * in.models;
    row_maximum = math::row_maximum(log_weight, in.models);
    __syncwarp();  // until all lanes are done with the piece before
    for (int t = lane; t < in.models && t < kCached; t += kWarp) cache[t] = computed(t);
    __syncwarp();
    return true;
  }

  __device__ __forceinline__ Compute computed(int t) const {
    return math::relative_weight<Compute>(log_weight[t], row_maximum);
  }
  __device__ __forceinline__ Compute weight(int t) const { return t < kCached ? cache[t] : computed(t); }
};

/// The inputs of element p, read where they are used: from memory once, then from the L1 cache.
template <Element kElement>
struct GlobalElement {
  static constexpr bool kWeighted = true;
  using Bits = typename Storage<kElement>::Bits;
  using Compute = typename Storage<kElement>::Compute;
  const Bits* theta_values;
  const Bits* fisher_values;  // null: F = 1
  int64_t theta_stride;
  int64_t fisher_stride;
  const Piece<Compute>& piece;

  __device__ __forceinline__ GlobalElement(const MergeInputs& in, const Piece<Compute>& piece_, int64_t p)
      : theta_values(static_cast<const Bits*>(in.theta) + p),
        fisher_values(in.fisher ? static_cast<const Bits*>(in.fisher) + p : nullptr),
        theta_stride(in.theta_stride),
        fisher_stride(in.fisher_stride),
        piece(piece_) {}

  __device__ __forceinline__ Compute alpha(int t) const { return piece.weight(t); }
  __device__ __forceinline__ Compute theta(int t) const {
    return Storage<kElement>::decode(theta_values[t * theta_stride]);
  }
  __device__ __forceinline__ Compute fisher(int t) const {
    if (alpha(t) == Compute{}) return Compute{};
    return fisher_values ? Storage<kElement>::decode(fisher_values[t * fisher_stride]) : Compute{1};
  }
};

/// Calls f(piece, tile) for each piece of the tiles of this warp; all lanes together.
template <class Compute, class F>
__device__ __forceinline__ void for_each_piece(const MergeInputs& in, const Tiling& tiling, Compute* cache, int lane,
                                               const F& f) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  for (; tile < tiling.tiles; tile += stride) {
    const int64_t begin = tile * tiling.length;
    const int64_t end = begin + tiling.length < in.elements ? begin + tiling.length : in.elements;
    Piece<Compute> piece = {};
    piece.cache = cache + threadIdx.x / kWarp * kCached;
    int64_t segment = find_segment(in.offsets, in.segments, begin, lane);
    for (; piece.enter(in, segment, begin, end, lane); ++segment) f(piece, tile);
  }
}

template <Element kElement>
__global__ void __launch_bounds__(kThreads, 1)
    forward_general_kernel(const __grid_constant__ MergeInputs in, Tiling tiling, void* merged) {
  using Compute = typename Storage<kElement>::Compute;
  TIMM_EXT_SHARED(Compute, cache, kWarps * kCached);
  const int lane = threadIdx.x % kWarp;
  const int models = static_cast<int>(in.models);
  auto* const out = static_cast<typename Storage<kElement>::Bits*>(merged);
  for_each_piece(in, tiling, cache, lane, [&](const Piece<Compute>& piece, int64_t) {
    for (int64_t p = piece.begin + lane; p < piece.end; p += kWarp) {
      const GlobalElement<kElement> element(in, piece, p);
      out[p] = Storage<kElement>::encode(math::merged_value(math::merge<Compute>(element, models)));
    }
  });
}

constexpr int kTogether = 8;  // models whose sums are kept in registers; each further eight take another pass

/// Σ over the piece of the terms of models `first`, …, `first` + kTogether - 1; those beyond T stay 0.
template <Element kElement, class Compute>
__device__ __forceinline__ void sum_terms(const MergeInputs& in, const MergeGradient& gradient,
                                          const Piece<Compute>& piece, int first, int lane,
                                          Compute (&sums)[kTogether]) {
  const auto* const values = static_cast<const typename Storage<kElement>::Bits*>(gradient.values);
  const int models = static_cast<int>(in.models);
  TIMM_EXT_UNROLL
  for (int i = 0; i < kTogether; ++i) sums[i] = 0;
  for (int64_t p = piece.begin + lane; p < piece.end; p += kWarp) {
    const GlobalElement<kElement> element(in, piece, p);
    const math::Merge<Compute> m = math::merge<Compute>(element, models);
    const Compute g = Storage<kElement>::decode(values[p * gradient.stride]);
    TIMM_EXT_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      if (first + i < models) {
        sums[i] += g * (math::merge_share(element, m, first + i) * math::merge_offset(element, m, first + i));
      }
    }
  }
}

template <Element kElement>
__global__ void __launch_bounds__(kThreads, 1)
    backward_general_kernel(const __grid_constant__ MergeInputs in, MergeGradient gradient, Tiling tiling, Edges edges,
                            void* rows) {
  using Compute = typename Storage<kElement>::Compute;
  TIMM_EXT_SHARED(Compute, cache, kWarps * kCached);
  const int lane = threadIdx.x % kWarp;
  const int models = static_cast<int>(in.models);
  for_each_piece(in, tiling, cache, lane, [&](const Piece<Compute>& piece, int64_t tile) {
    TileSums<Compute> edge = {edges, tiling, static_cast<Compute*>(rows), in.models, tile, -1};
    if (piece.begin == tile * tiling.length) edge.enter(in.offsets, tile, piece.segment, lane);
    const bool goes_on = in.offsets[piece.segment + 1] > piece.end;
    for (int first = 0; first < models; first += kTogether) {
      Compute sums[kTogether];
      sum_terms<kElement>(in, gradient, piece, first, lane, sums);
      TIMM_EXT_UNROLL
      for (int i = 0; i < kTogether; ++i) {
        const Compute sum = warp_sum(sums[i]);
        if (lane > 0 || first + i >= models) continue;
        if (goes_on) {
          edge.leave(piece.segment, first + i, sum);
        } else {
          edge.close(piece.segment, first + i, sum);
        }
      }
    }
  });
}

template <Element kElement>
__global__ void __launch_bounds__(kThreads, 1)
    matrices_general_kernel(const __grid_constant__ MergeInputs in, MergeGradient gradient, Tiling tiling,
                            MergeMatrixGradients outputs) {
  using Compute = typename Storage<kElement>::Compute;
  using Bits = typename Storage<kElement>::Bits;
  TIMM_EXT_SHARED(Compute, cache, kWarps * kCached);
  const int lane = threadIdx.x % kWarp;
  const int models = static_cast<int>(in.models);
  Bits* const theta = static_cast<Bits*>(outputs.theta);
  Bits* const fisher = static_cast<Bits*>(outputs.fisher);
  for_each_piece(in, tiling, cache, lane, [&](const Piece<Compute>& piece, int64_t) {
    for (int64_t p = piece.begin + lane; p < piece.end; p += kWarp) {
      const GlobalElement<kElement> element(in, piece, p);
      const math::Merge<Compute> m = math::merge<Compute>(element, models);
      const Compute g = Storage<kElement>::decode(static_cast<const Bits*>(gradient.values)[p * gradient.stride]);
      for (int t = 0; t < models; ++t) {
        if (theta)
          theta[t * outputs.theta_stride + p] = Storage<kElement>::encode(g * math::merge_share(element, m, t));
        if (!fisher) continue;
        fisher[t * outputs.fisher_stride + p] = Storage<kElement>::encode(g * math::merge_fisher_slope(element, m, t));
      }
    }
  });
}

/// call(element tag) for the element type of the inputs.
template <class F>
int with_element(Element element, const F& call) {
  switch (element) {
    case Element::kBFloat16:
      return call(ElementTag<Element::kBFloat16>{});
    case Element::kFloat16:
      return call(ElementTag<Element::kFloat16>{});
    case Element::kFloat64:
      return call(ElementTag<Element::kFloat64>{});
    default:
      return call(ElementTag<Element::kFloat32>{});
  }
}

}  // namespace

int merge_forward_general(const MergeInputs& in, void* merged, void* stream) {
  const Tiling tiling = tiling_of(in.elements, kWarp);
  return with_element(in.element, [&](auto element) {
    return launch(forward_general_kernel<element()>, grid_size(tiling.tiles, kWarps), kThreads, stream, in, tiling,
                  merged);
  });
}

int merge_backward_general(const MergeInputs& in, const MergeGradient& gradient, const Tiling& tiling,
                           const Edges& edges, void* grad_log_weight, void* stream) {
  return with_element(in.element, [&](auto element) {
    return launch(backward_general_kernel<element()>, grid_size(tiling.tiles, kWarps), kThreads, stream, in, gradient,
                  tiling, edges, grad_log_weight);
  });
}

int merge_matrices_general(const MergeInputs& in, const MergeGradient& gradient, const MergeMatrixGradients& outputs,
                           void* stream) {
  const Tiling tiling = tiling_of(in.elements, kWarp);
  return with_element(in.element, [&](auto element) {
    return launch(matrices_general_kernel<element()>, grid_size(tiling.tiles, kWarps), kThreads, stream, in, gradient,
                  tiling, outputs);
  });
}

}  // namespace timm_ext::cuda
