// SPDX-License-Identifier: Apache-2.0
//
// Which part of a convolution a block works on, and how it brings the grad and input of a box into shared memory.
#pragma once

#include "conv3d/cuda/conv_square_tiling.h"
#include "conv3d/cuda/copy_async.h"
#include "cuda/storage.h"

namespace timm_ext::cuda {

/// A tile: where its outputs and units begin, and how many are there.
struct ConvPlace {
  int group, output, unit;
  int outputs, units;
};

TIMM_EXT_FN ConvPlace conv_place(const ConvTiling& p, int tile) {
  ConvPlace place = {};
  place.unit = tile % p.unit_tiles * p.units;
  tile /= p.unit_tiles;
  place.output = tile % p.output_tiles * p.outputs();
  place.group = tile / p.output_tiles;
  const int outputs_left = p.size.outputs - place.output, units_left = p.unit_count - place.unit;
  place.outputs = outputs_left < p.outputs() ? outputs_left : p.outputs();
  place.units = units_left < p.units ? units_left : p.units;
  return place;
}

/// The first point of a box.
struct ConvOrigin {
  int point[3];

  __device__ __forceinline__ ConvOrigin(const ConvTiling& p, int box) {
    point[2] = box % p.boxes[2] * p.box[2];
    box /= p.boxes[2];
    point[1] = box % p.boxes[1] * p.box[1];
    point[0] = box / p.boxes[1] * p.box[0];
  }
};

/// The channels of a group, of one example.
template <Element kElement>
struct ConvSource {
  using Bits = typename Storage<kElement>::Bits;
  using Four = Pack<kElement, 4 * static_cast<int>(sizeof(Bits))>;

  const Bits* values;
  int planes, lines, length;  // of a channel

  /// kCount neighbours along the last axis, one or (aligned) four, to shared memory, where they are after
  /// wait_for_copies(); zeros outside of the channel.
  template <int kCount>
  __device__ __forceinline__ void load(int channel, int d, int h, int w, bool there, float* to) const {
    const bool inside = there && static_cast<unsigned>(d) < static_cast<unsigned>(planes) &&
                        static_cast<unsigned>(h) < static_cast<unsigned>(lines) &&
                        static_cast<unsigned>(w) < static_cast<unsigned>(length);
    const int64_t at = static_cast<int64_t>((channel * planes + d) * lines + h) * length + w;
    const Bits* const from = values + (inside ? at : 0);
    if constexpr (kElement == Element::kFloat32) {
      copy_async<kCount>(to, from, inside);
    } else if constexpr (kCount == 1) {
      *to = inside ? Storage<kElement>::decode(__ldg(from)) : 0.0f;
    } else {
      const Four four = inside ? Four::load(from) : Four{};
      const float4 found = {four.get(0), four.get(1), four.get(2), four.get(3)};
      *reinterpret_cast<float4*>(to) = found;
    }
  }
};

/// Calls body(a, b, c, d) for the thread's share of a < count and the limits of the walk.
template <class Body>
__device__ __forceinline__ void conv_walk(const ConvWalk& walk, int count, const Body& body) {
  int rest = static_cast<int>(threadIdx.x);
  int d = rest % walk.limit[2];
  rest /= walk.limit[2];
  int c = rest % walk.limit[1];
  rest /= walk.limit[1];
  int b = rest % walk.limit[0], a = rest / walk.limit[0];
  TIMM_EXT_NO_UNROLL
  while (a < count) {
    body(a, b, c, d);
    d += walk.step[3];
    c += walk.step[2] + (d >= walk.limit[2]);
    d -= d >= walk.limit[2] ? walk.limit[2] : 0;
    b += walk.step[1] + (c >= walk.limit[1]);
    c -= c >= walk.limit[1] ? walk.limit[1] : 0;
    a += walk.step[0] + (b >= walk.limit[0]);
    b -= b >= walk.limit[0] ? walk.limit[0] : 0;
  }
}

template <int kCount, Element kElement>
__device__ __forceinline__ void stage_grad(const ConvTiling& p, const ConvPlace& place, const ConvOrigin& origin,
                                           const ConvSource<kElement>& source, float* grad) {
  conv_walk(p.grad_walk, p.outputs(), [&](int output, int d, int h, int value) {
    const int w = value * kCount;
    float* const to = grad + output * p.grad_floats + (d * p.box[1] + h) * p.box[2] + w;
    source.template load<kCount>(place.output + output, origin.point[0] + d, origin.point[1] + h, origin.point[2] + w,
                                 output < place.outputs, to);
  });
}

template <int kCount, Element kElement>
__device__ __forceinline__ void stage_input(const ConvTiling& p, const ConvPlace& place, const ConvOrigin& origin,
                                            const ConvSource<kElement>& source, float* slab) {
  const ConvSize& s = p.size;
  conv_walk(p.input_walk, place.units, [&](int unit, int plane, int line, int value) {
    int d = origin.point[0] * s.stride[0] - s.padding[0] + plane * p.input_step[0];
    int h = origin.point[1] * s.stride[1] - s.padding[1] + line * p.input_step[1];
    int w = origin.point[2] * s.stride[2] - s.padding[2] + (value * kCount - p.lead) * p.input_step[2];
    int channel = place.unit + unit;
    if (p.outside > 2) {
      w += channel % s.kernel[2] * s.dilation[2];
      channel /= s.kernel[2];
    }
    if (p.outside > 1) {
      h += channel % s.kernel[1] * s.dilation[1];
      channel /= s.kernel[1];
    }
    if (p.outside > 0) {
      d += channel % s.kernel[0] * s.dilation[0];
      channel /= s.kernel[0];
    }
    float* const to = slab + unit * p.unit_floats + plane * p.plane_floats + line * p.line_floats + value * kCount;
    source.template load<kCount>(channel, d, h, w, true, to);
  });
}

}  // namespace timm_ext::cuda
