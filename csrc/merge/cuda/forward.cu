// SPDX-License-Identifier: Apache-2.0
#include "merge/cuda/dispatch.h"
#include "merge/cuda/general.h"
#include "merge/cuda/launchers.h"
#include "merge/cuda/walk.h"

namespace timm_ext::cuda {
namespace {

/// merged[p] = θ*_p.
template <class P>
struct Forward : Steps {
  using Compute = typename P::Compute;
  typename P::Bits* merged;
  bool vectors;
  Compute values[P::kSize];

  template <class E>
  __device__ __forceinline__ void element(int i, const E&, const math::Merge<Compute>& m) {
    values[i] = math::merged_value(m);
  }
  /// An ordinary store: the network reads the merged parameters next.
  __device__ __forceinline__ void end_row(bool, int64_t position, int64_t count) {
    store_pack(P::Vector::encoded(values), merged + position, count, vectors);
  }
};

template <class P>
__global__ void __launch_bounds__(kThreads, 1)
    forward_kernel(const __grid_constant__ MergeInputs in, const __grid_constant__ Tiling tiling, bool vectors,
                   bool store_vectors, void* merged) {
  Forward<P> body = {{}, static_cast<typename P::Bits*>(merged), store_vectors, {}};
  walk<P>(in, tiling, vectors, body);
}

}  // namespace

int merge_forward(const MergeInputs& in, void* merged, void* stream) {
  if (in.elements == 0) return 0;
  if (!packed(in)) return merge_forward_general(in, merged, stream);
  return with_packed<AllModels>(in, [&](auto* packs) {
    using P = std::remove_pointer_t<decltype(packs)>;
    const Tiling tiling = tiling_of(in.elements, P::kRow);
    return launch(forward_kernel<P>, grid_size(tiling.tiles, kWarps), kThreads, stream, in, tiling, P::aligned_in(in),
                  aligned(merged, 0, 1, sizeof(typename P::Vector)), merged);
  });
}

}  // namespace timm_ext::cuda
