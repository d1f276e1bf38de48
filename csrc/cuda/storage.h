// SPDX-License-Identifier: Apache-2.0
//
// How each element type is stored, and vectors ("packs") of stored elements that move in one load or store.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "math/scalar.h"
#ifndef __CUDACC__
#include "math/half.h"
#endif
#include "cuda/launch.h"
#include "math/element.h"

namespace timm_ext::cuda {

using math::bit_cast;

/// Stored bits and their value in the type of the arithmetic.
template <Element kElement>
struct Storage;

template <>
struct Storage<Element::kFloat32> {
  using Bits = uint32_t;
  using Compute = float;
  TIMM_EXT_FN static float decode(Bits bits) { return bit_cast<float>(bits); }
  TIMM_EXT_FN static Bits encode(float value) { return bit_cast<Bits>(value); }
};

template <>
struct Storage<Element::kFloat64> {
  using Bits = uint64_t;
  using Compute = double;
  TIMM_EXT_FN static double decode(Bits bits) { return bit_cast<double>(bits); }
  TIMM_EXT_FN static Bits encode(double value) { return bit_cast<Bits>(value); }
};

template <>
struct Storage<Element::kBFloat16> {
  using Bits = uint16_t;
  using Compute = float;
  TIMM_EXT_FN static float decode(Bits bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
  TIMM_EXT_FN static Bits encode(float value) {  // to the nearest, ties to even
    const uint32_t bits = bit_cast<uint32_t>(value);
    if (value != value) return 0x7FC0;
    return static_cast<Bits>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  TIMM_EXT_FN static uint32_t encode_pair(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
  }
#else
  TIMM_EXT_FN static uint32_t encode_pair(float low, float high) {
    return encode(low) | static_cast<uint32_t>(encode(high)) << 16;
  }
#endif
};

template <>
struct Storage<Element::kFloat16> {
  using Bits = uint16_t;
  using Compute = float;
#if defined(__CUDA_ARCH__)
  TIMM_EXT_FN static float decode(Bits bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
  }
  TIMM_EXT_FN static Bits encode(float value) {
    Bits bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
  }
#elif defined(__CUDACC__)  // nvcc's host pass: declarations only
  TIMM_EXT_FN static float decode(Bits) { return 0; }
  TIMM_EXT_FN static Bits encode(float) { return 0; }
#else
  TIMM_EXT_FN static float decode(Bits bits) { return math::to_float(math::Float16{bits}); }
  TIMM_EXT_FN static Bits encode(float value) {
    math::Float16 half;
    math::from_float(half, value);
    return half.bits;
  }
#endif
  TIMM_EXT_FN static uint32_t encode_pair(float low, float high) {
    return encode(low) | static_cast<uint32_t>(encode(high)) << 16;
  }
};

/// kBytes of consecutive elements, held in 32-bit registers.
template <Element kElement, int kBytes>
struct Pack {
  using Bits = typename Storage<kElement>::Bits;
  using Compute = typename Storage<kElement>::Compute;
  static constexpr int kSize = kBytes / static_cast<int>(sizeof(Bits));

  static_assert(kBytes == 16 || kBytes == 8, "a pack is one vector load or store");
  using Vector = std::conditional_t<kBytes == 16, uint4, uint2>;

  uint32_t words[kBytes / 4];

  TIMM_EXT_FN Compute get(int i) const {
    if constexpr (sizeof(Bits) == 8) {
      return Storage<kElement>::decode(static_cast<Bits>(words[2 * i + 1]) << 32 | words[2 * i]);
    } else if constexpr (sizeof(Bits) == 4) {
      return Storage<kElement>::decode(words[i]);
    } else {
      return Storage<kElement>::decode(static_cast<Bits>(words[i / 2] >> (i % 2 * 16)));
    }
  }

  TIMM_EXT_FN void set_bits(int i, Bits bits) {
    if constexpr (sizeof(Bits) == 8) {
      words[2 * i] = static_cast<uint32_t>(bits);
      words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
    } else if constexpr (sizeof(Bits) == 4) {
      words[i] = bits;
    } else {
      const int shift = i % 2 * 16;
      words[i / 2] = (words[i / 2] & ~(0xFFFFu << shift)) | static_cast<uint32_t>(bits) << shift;
    }
  }

  TIMM_EXT_FN static Pack encoded(const Compute (&values)[kSize]) {
    Pack pack = {};
    TIMM_EXT_UNROLL
    for (int i = 0; i < kSize; ++i) {
      if constexpr (sizeof(Bits) > 2) {
        pack.set(i, values[i]);
      } else if (i % 2 == 0) {
        pack.words[i / 2] = Storage<kElement>::encode_pair(values[i], values[i + 1]);
      }
    }
    return pack;
  }

  TIMM_EXT_FN void set(int i, Compute value) { set_bits(i, Storage<kElement>::encode(value)); }
  TIMM_EXT_FN Bits bits(int i) const {
    if constexpr (sizeof(Bits) == 8) return static_cast<Bits>(words[2 * i + 1]) << 32 | words[2 * i];
    if constexpr (sizeof(Bits) == 4) return words[i];
    if constexpr (sizeof(Bits) == 2) return static_cast<Bits>(words[i / 2] >> (i % 2 * 16));
  }

  /// All elements equal, for a matrix of constants or a gradient that is one value.
  TIMM_EXT_FN static Pack filled(Bits bits) {
    Pack pack = {};
    TIMM_EXT_UNROLL
    for (int i = 0; i < kSize; ++i) pack.set_bits(i, bits);
    return pack;
  }

  /// The whole pack at an address that is aligned to it and that the kernel does not write.
  __device__ static Pack load(const Bits* address) { return unpack(__ldg(reinterpret_cast<const Vector*>(address))); }

  /// The same of a matrix that is read once: the first to leave the caches, so that they keep what the network needs.
  __device__ static Pack load_once(const Bits* address) {
    return unpack(__ldcs(reinterpret_cast<const Vector*>(address)));
  }

  /// The same where the kernel writes too.
  __device__ static Pack load_written(const Bits* address) { return unpack(*reinterpret_cast<const Vector*>(address)); }

  /// The whole pack one by one, at any address.
  __device__ static Pack load_each(const Bits* address) {
    Pack pack = {};
    TIMM_EXT_UNROLL
    for (int i = 0; i < kSize; ++i) pack.set_bits(i, __ldg(address + i));
    return pack;
  }

  /// The first `count` elements one by one; the others are 0.
  __device__ static Pack load_some(const Bits* address, int count) {
    Pack pack = {};
    TIMM_EXT_UNROLL
    for (int i = 0; i < kSize; ++i) {
      if (i < count) pack.set_bits(i, address[i]);
    }
    return pack;
  }

  __device__ static Pack unpack(uint4 v) { return {{v.x, v.y, v.z, v.w}}; }
  __device__ static Pack unpack(uint2 v) { return {{v.x, v.y}}; }

  __device__ void store(Bits* address) const {
    if constexpr (kBytes == 16) {
      *reinterpret_cast<uint4*>(address) = uint4{words[0], words[1], words[2], words[3]};
    } else {
      *reinterpret_cast<uint2*>(address) = uint2{words[0], words[1]};
    }
  }

  __device__ void store_some(Bits* address, int count) const {
    TIMM_EXT_UNROLL
    for (int i = 0; i < kSize; ++i) {
      if (i < count) address[i] = bits(i);
    }
  }
};

}  // namespace timm_ext::cuda
