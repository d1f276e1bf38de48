// SPDX-License-Identifier: Apache-2.0
//
// The lanes of vectors are weights, one tap after another. Compiled with fused multiply-add where there is one: the
// bits hang on the instruction set, but not on the number of threads.
#include "conv3d/cpu/small_square.h"

#include <cstring>

#include "conv3d/cpu/kernels.h"
#include "conv3d/cpu/tile.h"
#include "cpu/buffer.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int kOutputs = kTileOutputs;
constexpr int64_t kAhead = 256;  // elements at which the accumulator is fetched: the processor follows few rows

/// A channel with zeros around, and the neighbourhoods in it.
class Padded {
 public:
  static int64_t elements(const ConvShape& s) {
    return (s.in[0] + 2 * s.padding[0]) * (s.in[1] + 2 * s.padding[1]) * (s.in[2] + 2 * s.padding[2]);
  }

  Padded(const ConvShape& s, float* memory)
      : s_(s), rows_(s.in[1] + 2 * s.padding[1]), columns_(s.in[2] + 2 * s.padding[2]), padded_(memory) {
    std::memset(padded_, 0, elements(s) * sizeof(float));
  }

  void fill(const float* from) const {
    for (int64_t d = 0; d < s_.in[0]; ++d) {
      for (int64_t h = 0; h < s_.in[1]; ++h, from += s_.in[2]) {
        float* const row = padded_ + ((d + s_.padding[0]) * rows_ + h + s_.padding[1]) * columns_ + s_.padding[2];
        std::memcpy(row, from, s_.in[2] * sizeof(float));
      }
    }
  }

  /// What each tap meets, at one point after another, `step` elements apart.
  void write_neighbours(float* to, int64_t step) const {
    for (int64_t d = 0; d < s_.out[0]; ++d) {
      for (int64_t h = 0; h < s_.out[1]; ++h) {
        for (int64_t w = 0; w < s_.out[2]; ++w, to += step) {
          write_taps(padded_ + (d * s_.stride[0] * rows_ + h * s_.stride[1]) * columns_ + w * s_.stride[2], to);
        }
      }
    }
  }

 private:
  void write_taps(const float* corner, float* to) const {
    for (int64_t d = 0; d < s_.kernel[0]; ++d) {
      for (int64_t h = 0; h < s_.kernel[1]; ++h) {
        const float* const from = corner + (d * s_.dilation[0] * rows_ + h * s_.dilation[1]) * columns_;
        for (int64_t w = 0; w < s_.kernel[2]; ++w) *to++ = from[w * s_.dilation[2]];
      }
    }
  }

  const ConvShape& s_;
  int64_t rows_;
  int64_t columns_;
  float* padded_;
};

/// Some outputs at two vectors of weights.
class Block {
 public:
  Block(const SmallSquareProblem& p, int64_t first)
      : p_(p),
        first_(first),
        outputs_(smaller_of(kOutputs, p.shape->outputs - first)),
        step_(p.shape->inputs * p.taps()),
        accumulator_(p.accumulator + first * step_ + p.first * p.taps()) {}

  void add() const {
    const int64_t points = p_.squared ? p_.points() : p_.examples * p_.points();  // whose products are one sum
    const int64_t width = p_.width(), weights = p_.channels * p_.taps();
    for (int64_t w = 0; w < weights; w += 2 * kLanes) {
      for (int64_t o = 0; o < outputs_; ++o) {
        __builtin_prefetch(accumulator_ + o * step_ + w + kAhead, 1);
        __builtin_prefetch(accumulator_ + o * step_ + w + kAhead + kLanes, 1);
      }
      for (int64_t point = 0; point < p_.examples * p_.points(); point += points) {
        const float* const grad = p_.grad + point * p_.padded_outputs() + first_;
        add_points(points, grad, p_.rows + point * width + w, w, weights - w);
      }
    }
  }

 private:
  void add_points(int64_t points, const float* grad, const float* rows, int64_t place, int64_t weights) const {
    const int64_t width = p_.width(), outputs = p_.padded_outputs();
    V sums[kOutputs][2] = {};
    add_products(
        points, [&](int64_t point, int o) { return math::broadcast(grad + point * outputs + o); },
        [&](int64_t point, int v) { return math::load<V>(rows + point * width + v * kLanes); }, sums);
    for (int o = 0; o < kOutputs; ++o) {
      if (o == outputs_) return;
      float* const to = accumulator_ + o * step_ + place;
      add_scaled(p_.squared ? sums[o][0] * sums[o][0] : sums[o][0], to, weights);
      add_scaled(p_.squared ? sums[o][1] * sums[o][1] : sums[o][1], to + kLanes, weights - kLanes);
    }
  }

  void add_scaled(V values, float* to, int64_t count) const {
    if (count >= kLanes) {
      math::store(to, math::load<V>(to) + p_.scale * values);
    } else {
      for (int64_t k = 0; k < count; ++k) to[k] += p_.scale * values[k];
    }
  }

  const SmallSquareProblem& p_;
  int64_t first_;
  int64_t outputs_;
  int64_t step_;  // of the accumulator, from an output to the next
  float* accumulator_;
};

}  // namespace

void small_square_rows(const SmallSquareProblem& p, int64_t first_channel, int64_t last_channel) {
  const ConvShape& s = *p.shape;
  const Buffer<float> memory(Padded::elements(s));
  const Padded padded(s, memory.get());
  for (int64_t b = 0; b < p.examples; ++b) {
    for (int64_t i = first_channel; i < last_channel; ++i) {
      padded.fill(p.input + b * p.input_example + (p.first + i) * s.in[0] * s.in[1] * s.in[2]);
      padded.write_neighbours(p.rows + b * p.points() * p.width() + i * p.taps(), p.width());
    }
  }
}

void small_square(const SmallSquareProblem& p, int64_t first_block, int64_t last_block) {
  const int64_t last = smaller_of(last_block * kSmallSquareOutputs, p.shape->outputs);
  for (int64_t o = first_block * kSmallSquareOutputs; o < last; o += kOutputs) Block(p, o).add();
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
