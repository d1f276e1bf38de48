// SPDX-License-Identifier: Apache-2.0
//
// The formulas of norm_backward.cpp, where each channel of a row has its own numbers.
#include "norm/cpu/channels_last.h"
#include "norm/cpu/chunk.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

using math::BFloat16;

/// What a chunk needs of the norm, channel by channel.
struct Affine {
  explicit Affine(const Chunks& chunks) : mean(chunks), scale(chunks), shift(chunks), slant(chunks), constant(chunks) {}

  void of_example(const ChannelsLastGradient& p, int64_t example) const {
    const NormGradient& norm = p.norm;
    const int64_t first = example * p.chunks.channels;
    mean.fill([&](int64_t c) { return norm.mean[norm.sets.set_of(first + c)]; });
    scale.fill([&](int64_t c) { return (norm.weight != nullptr ? norm.weight[c] : 1) * rstd(norm, first + c); });
    shift.fill([&](int64_t c) { return norm.bias != nullptr ? norm.bias[c] : 0; });
  }

  /// After norm_backward_totals.
  void of_totals(const ChannelsLastGradient& p, int64_t example) const {
    const NormGradient& norm = p.norm;
    const int64_t first = example * p.chunks.channels;
    const auto totals = [&](int64_t c) { return norm.sums + 2 * norm.sets.map(norm.sets.set_of(first + c), 0); };
    constant.fill([&](int64_t c) { return static_cast<float>(-rstd(norm, first + c) * totals(c)[0]); });
    slant.fill([&](int64_t c) {
      const double r = rstd(norm, first + c);
      return static_cast<float>(-r * (r * r) * totals(c)[1]);
    });
  }

  static float rstd(const NormGradient& norm, int64_t map) {
    return inverse_deviation(norm.variance[norm.sets.set_of(map)], norm.epsilon);
  }

  Row mean;
  Row scale;
  Row shift;
  Row slant;
  Row constant;
};

void add_chunk(const ChannelsLastGradient& p, const Chunk& chunk, const Affine& affine, const Row& plain,
               const Row& centred) {
  const BFloat16 *const input = p.input + chunk.first, *const gradient = p.grad + chunk.first;
  const float slope = p.slope;
  for (int64_t column = 0; column < p.chunks.width; column += kColumns) {
    V sums[2][kVectors] = {};
    for (int64_t row = column; row < chunk.whole; row += p.chunks.width) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t i = column + v * kLanes;
        const V x = math::load_floats(input + row + v * kLanes) - affine.mean.at(i);
        const V grad = math::load_floats(gradient + row + v * kLanes);
        const V d = math::select(affine.scale.at(i) * x + affine.shift.at(i) > 0, grad, slope * grad);
        sums[0][v] += d;
        sums[1][v] += d * x;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      math::store(plain.get() + column + v * kLanes, sums[0][v]);
      math::store(centred.get() + column + v * kLanes, sums[1][v]);
    }
  }
  for (int64_t i = chunk.whole; i < chunk.elements; ++i) {
    const int64_t column = i - chunk.whole;
    const float x = math::to_float(input[i]) - affine.mean.get()[column], grad = math::to_float(gradient[i]);
    const float d = grad * (affine.scale.get()[column] * x + affine.shift.get()[column] > 0 ? 1.0f : slope);
    plain.get()[column] += d;
    centred.get()[column] += d * x;
  }
}

void write_chunk(const ChannelsLastGradient& p, const Chunk& chunk, const Affine& affine) {
  const BFloat16 *const input = p.input + chunk.first, *const gradient = p.grad + chunk.first;
  BFloat16* const to = p.grad_input + chunk.first;
  const float slope = p.slope;
  for (int64_t row = 0; row < chunk.whole; row += p.chunks.width) {
    for (int64_t i = 0; i < p.chunks.width; i += kLanes) {
      const V scale = affine.scale.at(i), x = math::load_floats(input + row + i) - affine.mean.at(i);
      const V grad = math::load_floats(gradient + row + i);
      const V d = math::select(scale * x + affine.shift.at(i) > 0, grad, slope * grad);
      math::store_floats(to + row + i, scale * d + (affine.slant.at(i) * x + affine.constant.at(i)));
    }
  }
  for (int64_t i = chunk.whole; i < chunk.elements; ++i) {
    const int64_t column = i - chunk.whole;
    const float scale = affine.scale.get()[column], x = math::to_float(input[i]) - affine.mean.get()[column];
    const float d = math::to_float(gradient[i]) * (scale * x + affine.shift.get()[column] > 0 ? 1.0f : slope);
    math::from_float(to[i], scale * d + (affine.slant.get()[column] * x + affine.constant.get()[column]));
  }
}

}  // namespace

void channels_last_backward_sums(const ChannelsLastGradient& p, int64_t first_chunk, int64_t last_chunk) {
  const Affine affine(p.chunks);
  const Row plain(p.chunks), centred(p.chunks);
  int64_t example = -1;
  for (int64_t number = first_chunk; number < last_chunk; ++number) {
    const Chunk chunk(p.chunks, number);
    if (chunk.example != example) affine.of_example(p, example = chunk.example);
    add_chunk(p, chunk, affine, plain, centred);
    double* const parts = p.parts + 2 * number * p.chunks.channels;
    for (int64_t c = 0; c < p.chunks.channels; ++c) {
      parts[2 * c] = plain.sum(c);
      parts[2 * c + 1] = centred.sum(c);
    }
  }
}

void channels_last_backward_join(const ChannelsLastGradient& p, int64_t first_example, int64_t last_example) {
  const int64_t channels = p.chunks.channels;
  const NormGradient& norm = p.norm;
  for (int64_t map = first_example * channels; map < last_example * channels; ++map) {
    double plain = 0, centred = 0;
    for (int64_t i = 0; i < p.chunks.count; ++i) {
      const double* const part = p.parts + 2 * ((map / channels * p.chunks.count + i) * channels + map % channels);
      plain += part[0];
      centred += part[1];
    }
    const float weight = norm.weight != nullptr ? norm.weight[map % channels] : 1;
    norm.sums[2 * map] = weight * plain;
    norm.sums[2 * map + 1] = weight * centred;
    norm.grad_bias[map] = static_cast<float>(plain);
    norm.grad_weight[map] = static_cast<float>(centred * Affine::rstd(norm, map));
  }
}

void channels_last_backward_write(const ChannelsLastGradient& p, int64_t first_chunk, int64_t last_chunk) {
  const Affine affine(p.chunks);
  int64_t example = -1;
  for (int64_t number = first_chunk; number < last_chunk; ++number) {
    const Chunk chunk(p.chunks, number);
    if (chunk.example != example) {
      example = chunk.example;
      affine.of_example(p, example);
      affine.of_totals(p, example);
    }
    write_chunk(p, chunk, affine);
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
