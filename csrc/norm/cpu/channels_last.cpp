// SPDX-License-Identifier: Apache-2.0
//
// As in normalise.cpp, a chunk being a part: it stays in the first-level cache between its mean and its squares.
#include "norm/cpu/channels_last.h"

#include "norm/cpu/chunk.h"
#include "norm/cpu/moments.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

using math::BFloat16;

/// Into `sums` those of x - near over a chunk, column by column, into `squares` those of its squares.
void add_chunk(const BFloat16* input, const Chunk& chunk, int64_t width, const Row& near, const Row& sums,
               const Row& squares) {
  for (int64_t column = 0; column < width; column += kColumns) {
    V plain[kVectors] = {}, square[kVectors] = {};
    for (int64_t row = column; row < chunk.whole; row += width) {
      for (int v = 0; v < kVectors; ++v) {
        const V apart = math::load_floats(input + row + v * kLanes) - near.at(column + v * kLanes);
        plain[v] += apart;
        square[v] += apart * apart;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      math::store(sums.get() + column + v * kLanes, plain[v]);
      math::store(squares.get() + column + v * kLanes, square[v]);
    }
  }
  for (int64_t i = chunk.whole; i < chunk.elements; ++i) {
    const int64_t column = i - chunk.whole;
    const float apart = math::to_float(input[i]) - near.get()[column];
    sums.get()[column] += apart;
    squares.get()[column] += apart * apart;
  }
}

}  // namespace

void channels_last_moments(const ChannelsLastProblem& p, int64_t first_chunk, int64_t last_chunk) {
  const Row near(p.chunks), sums(p.chunks), squares(p.chunks);
  for (int64_t number = first_chunk; number < last_chunk; ++number) {
    const Chunk chunk(p.chunks, number);
    const BFloat16* const input = p.input + chunk.first;
    const double points = static_cast<double>(chunk.elements / p.chunks.channels);
    near.fill([](int64_t) { return 0.0f; });
    add_chunk(input, chunk, p.chunks.width, near, sums, squares);
    near.fill([&](int64_t c) { return static_cast<float>(sums.sum(c) / points); });
    add_chunk(input, chunk, p.chunks.width, near, sums, squares);
    double* const parts = p.parts + 2 * number * p.chunks.channels;
    for (int64_t c = 0; c < p.chunks.channels; ++c) {
      const double sum = sums.sum(c);
      parts[2 * c] = near.get()[c] + sum / points;
      parts[2 * c + 1] = squares.sum(c) - sum * sum / points;
    }
  }
}

void channels_last_join(const ChannelsLastProblem& p, int64_t first_example, int64_t last_example) {
  const int64_t channels = p.chunks.channels;
  for (int64_t map = first_example * channels; map < last_example * channels; ++map) {
    Moments moments;
    for (int64_t i = 0; i < p.chunks.count; ++i) {
      const int64_t number = map / channels * p.chunks.count + i;
      const double* const part = p.parts + 2 * (number * channels + map % channels);
      const Chunk chunk(p.chunks, number);
      moments.join({static_cast<double>(chunk.elements / channels), part[0], part[1]});
    }
    p.norm.moments[2 * map] = moments.mean;
    p.norm.moments[2 * map + 1] = moments.squares;
  }
}

void channels_last_write(const ChannelsLastProblem& p, int64_t first_chunk, int64_t last_chunk) {
  const Row mean(p.chunks), scale(p.chunks), shift(p.chunks);
  const NormProblem& norm = p.norm;
  int64_t example = -1;
  for (int64_t number = first_chunk; number < last_chunk; ++number) {
    const Chunk chunk(p.chunks, number);
    if (chunk.example != example) {
      example = chunk.example;
      const auto set = [&](int64_t c) { return norm.sets.set_of(example * p.chunks.channels + c); };
      mean.fill([&](int64_t c) { return norm.mean[set(c)]; });
      scale.fill([&](int64_t c) {
        return (norm.weight != nullptr ? norm.weight[c] : 1) * inverse_deviation(norm.variance[set(c)], norm.epsilon);
      });
      shift.fill([&](int64_t c) { return norm.bias != nullptr ? norm.bias[c] : 0; });
    }
    const BFloat16* const input = p.input + chunk.first;
    BFloat16* const output = p.output + chunk.first;
    for (int64_t row = 0; row < chunk.whole; row += p.chunks.width) {
      for (int64_t i = 0; i < p.chunks.width; i += kLanes) {
        const V x = math::load_floats(input + row + i);
        math::store_floats(output + row + i, scale.at(i) * (x - mean.at(i)) + shift.at(i));
      }
    }
    for (int64_t i = chunk.whole; i < chunk.elements; ++i) {
      const int64_t column = i - chunk.whole;
      const float x = math::to_float(input[i]);
      math::from_float(output[i], scale.get()[column] * (x - mean.get()[column]) + shift.get()[column]);
    }
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
