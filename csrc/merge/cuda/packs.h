// SPDX-License-Identifier: Apache-2.0
//
// θ and F of all models for the elements of one lane, in registers.
#pragma once

#include "cuda/storage.h"
#include "math/merge.h"
#include "merge/cuda/launchers.h"

namespace timm_ext::cuda {

/// Bytes of one load: 16, or 8 where packs of 16 would take so many registers that fewer warps would have no more bytes
/// on their way.
constexpr int vector_bytes(Element element, int64_t models) {
  return models > 8 || (models > 5 && element != Element::kFloat32) ? 8 : 16;
}

/// Whether rows of `stride` elements from `base` on can be moved in vectors of `bytes`.
inline bool aligned(const void* base, int64_t stride, int element_bytes, int bytes) {
  return reinterpret_cast<uintptr_t>(base) % bytes == 0 && stride * element_bytes % bytes == 0;
}

/// The pack at `address`, of which `count` elements exist. A matrix that does not start on a vector is read element by
/// element, all of a line in a row, so that it comes from memory once and then from the L1 cache.
template <class Vector>
__device__ __forceinline__ Vector load_pack(const typename Vector::Bits* address, int64_t count, bool vectors) {
  if (count < Vector::kSize) return Vector::load_some(address, count < 0 ? 0 : static_cast<int>(count));
  return vectors ? Vector::load_once(address) : Vector::load_each(address);
}

template <class Vector>
__device__ __forceinline__ void store_pack(const Vector& pack, typename Vector::Bits* address, int64_t count,
                                           bool vectors) {
  if (vectors && count >= Vector::kSize) {
    pack.store(address);
  } else {
    pack.store_some(address, count < Vector::kSize ? static_cast<int>(count) : Vector::kSize);
  }
}

/// One pack of θ and F of every model. Models beyond T repeat model 0 (their weight is 0), so that one kernel serves
/// several T: they change neither the sums nor the hull, and their loads find model 0's line in the cache.
template <Element kElement, int kModels, bool kFisher>
struct Packs {
  using Vector = Pack<kElement, vector_bytes(kElement, kModels)>;
  using Bits = typename Vector::Bits;
  using Compute = typename Vector::Compute;
  static constexpr int kSize = Vector::kSize;
  static constexpr int kRow = kWarp * kSize;
  static constexpr int kModelCount = kModels;
  static constexpr bool kHasFisher = kFisher;

  Vector theta[kModels];
  Vector fisher[kFisher ? kModels : 1];

  /// `count` elements from `position` on exist, at most kSize of them are wanted.
  __device__ __forceinline__ void load(const MergeInputs& in, int64_t position, int64_t count, bool vectors) {
    const Bits* theta_row = static_cast<const Bits*>(in.theta) + position;
    const Bits* fisher_row = static_cast<const Bits*>(in.fisher) + position;
    // One branch around all loads, not one in each: they must all be on their way before the first is waited for.
    if (count < kSize) {
      const int some = count < 0 ? 0 : static_cast<int>(count);
      each(in, theta_row, fisher_row, [&](const Bits* address) { return Vector::load_some(address, some); });
    } else if (vectors) {
      each(in, theta_row, fisher_row, [](const Bits* address) { return Vector::load_once(address); });
    } else {
      each(in, theta_row, fisher_row, [](const Bits* address) { return Vector::load_each(address); });
    }
  }

  template <class Load>
  __device__ __forceinline__ void each(const MergeInputs& in, const Bits* theta_row, const Bits* fisher_row,
                                       const Load& read) {
    TIMM_EXT_UNROLL
    for (int t = 0; t < kModels; ++t) {
      const int64_t row = t < in.models ? t : 0;
      theta[t] = read(theta_row + row * in.theta_stride);
      if constexpr (kFisher) fisher[t] = read(fisher_row + row * in.fisher_stride);
    }
  }

  static bool aligned_in(const MergeInputs& in) {
    return aligned(in.theta, in.theta_stride, sizeof(Bits), sizeof(Vector)) &&
           (!in.fisher || aligned(in.fisher, in.fisher_stride, sizeof(Bits), sizeof(Vector)));
  }
};

/// The gradient that flows back into the elements of one lane.
template <class P>
struct GradientPack {
  const MergeGradient& gradient;
  bool vectors;
  typename P::Vector pack;

  __device__ __forceinline__ void load(int64_t position, int64_t count) {
    const auto* const values = static_cast<const typename P::Bits*>(gradient.values);
    pack =
        gradient.stride ? load_pack<typename P::Vector>(values + position, count, vectors) : P::Vector::filled(*values);
  }
  __device__ __forceinline__ typename P::Compute get(int i) const { return pack.get(i); }

  static bool aligned_in(const MergeGradient& gradient) {
    return aligned(gradient.values, 0, 1, sizeof(typename P::Vector));
  }
};

/// The inputs of element `index` of the packs, as csrc/math/merge.h wants them.
template <class P>
struct PackedElement {
  static constexpr bool kWeighted = P::kHasFisher;
  using Compute = typename P::Compute;
  const P& packs;
  const Compute* weights;  // registers of the lane
  int index;

  __device__ __forceinline__ Compute theta(int t) const { return packs.theta[t].get(index); }
  __device__ __forceinline__ Compute alpha(int t) const { return weights[t]; }
  __device__ __forceinline__ Compute fisher(int t) const {
    return weights[t] == Compute{} ? Compute{} : packs.fisher[t].get(index);
  }
};

}  // namespace timm_ext::cuda
