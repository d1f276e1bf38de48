// SPDX-License-Identifier: Apache-2.0
#include "merge/cuda/dispatch.h"
#include "merge/cuda/general.h"
#include "merge/cuda/launchers.h"
#include "merge/cuda/walk.h"

namespace timm_ext::cuda {
namespace {

/// The gradients with respect to θ and F; those that are not wanted are computed and thrown away.
template <class P>
struct MatrixGradients : Steps {
  using Compute = typename P::Compute;
  using Vector = typename P::Vector;
  using Bits = typename P::Bits;
  const MergeInputs& in;
  const MergeMatrixGradients& outputs;
  GradientPack<P> g;
  Vector theta[P::kModelCount];
  Vector fisher[P::kHasFisher ? P::kModelCount : 1];

  __device__ __forceinline__ void load(int64_t position, int64_t count) { g.load(position, count); }
  template <class E>
  __device__ __forceinline__ void element(int i, const E& inputs, const math::Merge<Compute>& m) {
    TIMM_EXT_UNROLL
    for (int t = 0; t < P::kModelCount; ++t) {
      theta[t].set(i, g.get(i) * math::merge_share(inputs, m, t));
      if constexpr (P::kHasFisher) fisher[t].set(i, g.get(i) * math::merge_fisher_slope(inputs, m, t));
    }
  }
  __device__ __forceinline__ void end_row(bool, int64_t position, int64_t count) {
    TIMM_EXT_UNROLL
    for (int t = 0; t < P::kModelCount; ++t) {
      if (t >= in.models) break;
      write(outputs.theta, t * outputs.theta_stride + position, theta[t], count);
      if constexpr (P::kHasFisher) write(outputs.fisher, t * outputs.fisher_stride + position, fisher[t], count);
    }
  }

  __device__ __forceinline__ static void write(void* matrix, int64_t index, const Vector& pack, int64_t count) {
    if (!matrix) return;
    Bits* const address = static_cast<Bits*>(matrix) + index;
    store_pack(pack, address, count, reinterpret_cast<uintptr_t>(address) % sizeof(Vector) == 0);
  }
};

template <class P>
__global__ void __launch_bounds__(kThreads, 1)
    matrices_kernel(const __grid_constant__ MergeInputs in, const __grid_constant__ MergeGradient gradient,
                    const __grid_constant__ Tiling tiling, bool vectors, bool gradient_vectors,
                    const __grid_constant__ MergeMatrixGradients outputs) {
  MatrixGradients<P> body = {{}, in, outputs, {gradient, gradient_vectors, {}}, {}, {}};
  walk<P>(in, tiling, vectors, body);
}

// Few T only: the stores, which no model beyond T takes part in, are half of the work.
constexpr int kMaxModels = 8;
using FewModels = ModelChoices<2, 4, kMaxModels>;

}  // namespace

int merge_backward_matrices(const MergeInputs& in, const MergeGradient& gradient, const MergeMatrixGradients& outputs,
                            void* stream) {
  if (in.elements == 0) return 0;
  if (!packed(in) || in.models > kMaxModels) return merge_matrices_general(in, gradient, outputs, stream);
  return with_packed<FewModels>(in, [&](auto* packs) {
    using P = std::remove_pointer_t<decltype(packs)>;
    const Tiling tiling = tiling_of(in.elements, P::kRow);
    return launch(matrices_kernel<P>, grid_size(tiling.tiles, kWarps), kThreads, stream, in, gradient, tiling,
                  P::aligned_in(in), GradientPack<P>::aligned_in(gradient), outputs);
  });
}

}  // namespace timm_ext::cuda
