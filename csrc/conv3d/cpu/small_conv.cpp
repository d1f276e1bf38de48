// SPDX-License-Identifier: Apache-2.0
//
// The lanes of vectors are points of the output. Compiled with fused multiply-add where there is one: the bits hang on
// the instruction set, but not on the number of threads.
#include "conv3d/cpu/small_conv.h"

#include <algorithm>
#include <cstring>

#include "conv3d/cpu/kernels.h"
#include "conv3d/cpu/tile.h"
#include "cpu/buffer.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int64_t kChain = 16;  // channels of the input that are summed by themselves: long chains round more
constexpr int64_t kFewInputs = 4;
constexpr int64_t kCachedColumns = 1 << 18;  // elements that stay in the second-level cache
constexpr int kOutputs = kTileOutputs;

/// Some outputs at all points of all examples.
class Block {
 public:
  Block(const SmallConvProblem& p, int64_t first, V* sums)
      : p_(p), first_(first), count_(std::min<int64_t>(kOutputs, p.shape->outputs - first)), sums_(sums) {
    for (int o = 0; o < kOutputs; ++o)
      weights_[o] = p.weight + std::min(first + o, p.shape->outputs - 1) * p.output_step;
  }

  /// Some inputs to the sums at all points.
  void add(int64_t first, int64_t last) const {
    for (int64_t i = first; i < last; i += kChain) {
      const int64_t end = std::min(i + kChain, last);
      int64_t v = 0;
      for (; v + 2 <= vectors(); v += 2) add_chain<2>(i, end, v);
      if (v < vectors()) add_chain<1>(i, end, v);
    }
  }

  void write() const {
    for (int64_t o = 0; o < count_; ++o) write_output(o);
  }

 private:
  int64_t vectors() const { return p_.width / kLanes; }

  template <int Vectors>
  void add_chain(int64_t first, int64_t last, int64_t vector) const {
    V chain[kOutputs][Vectors] = {};
    for (int64_t i = first; i < last; ++i) {
      const float* const x = p_.columns + i * p_.taps * p_.width + vector * kLanes;
      const float* weights[kOutputs];
      for (int o = 0; o < kOutputs; ++o) weights[o] = weights_[o] + i * p_.input_step;
      if (vector == 0) fetch_next(i);
      add_products(
          p_.taps, [&](int64_t tap, int o) { return math::broadcast(weights[o] + tap); },
          [&](int64_t tap, int v) { return math::load<V>(x + tap * p_.width + v * kLanes); }, chain);
    }
    for (int o = 0; o < kOutputs; ++o) {
      for (int v = 0; v < Vectors; ++v) {
        V& sum = sums_[o * vectors() + vector + v];
        sum = first == 0 ? chain[o][v] : sum + chain[o][v];
      }
    }
  }

  /// Fetches the next block's weights of an input: nothing else would, on their way from far memory.
  void fetch_next(int64_t input) const {
    const float* const next = weights_[0] + kOutputs * p_.output_step + input * p_.input_step;
    for (int o = 0; o < kOutputs; ++o) {
      for (int64_t tap = 0; tap < p_.taps; tap += 16) __builtin_prefetch(next + o * p_.output_step + tap);
    }
  }

  void write_output(int64_t o) const {
    const float bias = p_.bias != nullptr ? p_.bias[first_ + o] : 0;
    const float* const from = reinterpret_cast<const float*>(sums_ + o * vectors());
    for (int64_t b = 0; b < p_.examples; ++b) {
      float* const to = p_.output + (b * p_.shape->outputs + first_ + o) * p_.points;
      for (int64_t n = 0; n < p_.points; ++n) to[n] = from[b * p_.points + n] + bias;
    }
  }

  const SmallConvProblem& p_;
  int64_t first_;
  int64_t count_;
  V* sums_;  // [kOutputs, vectors]
  const float* weights_[kOutputs];
};

/// Inputs that all outputs meet before the next ones: all of them where the weights of an output lie together and the
/// columns stay in the second-level cache, so that weights are read in the order of their memory; few where those of an
/// input lie together.
int64_t inputs_in_turn(const SmallConvProblem& p) {
  if (p.input_step > p.output_step) return kFewInputs;
  return p.shape->inputs * p.taps * p.width <= kCachedColumns ? p.shape->inputs : kChain;
}

/// One channel of all examples, with zeros around.
void pad(const SmallConvProblem& p, int64_t channel, float* to) {
  const ConvShape& s = *p.shape;
  for (int64_t b = 0; b < p.examples; ++b) {
    for (int64_t d = 0; d < s.in[0]; ++d) {
      for (int64_t h = 0; h < s.in[1]; ++h) {
        const int64_t row =
            (b * small_conv_padded(s, 0) + d + s.padding[0]) * small_conv_padded(s, 1) + h + s.padding[1];
        const float* const from = p.input + (((b * s.inputs + channel) * s.in[0] + d) * s.in[1] + h) * s.in[2];
        std::memcpy(to + row * small_conv_padded(s, 2) + s.padding[2], from, s.in[2] * sizeof(float));
      }
    }
  }
}

}  // namespace

void small_conv_columns(const SmallConvProblem& p, int64_t first_input, int64_t last_input) {
  const ConvShape& s = *p.shape;
  const int64_t size = p.examples * small_conv_padded(s, 0) * small_conv_padded(s, 1) * small_conv_padded(s, 2);
  const Buffer<float> padded(size);
  const float* const from = padded.get();
  std::memset(padded.get(), 0, size * sizeof(float));
  for (int64_t i = first_input; i < last_input; ++i) {
    pad(p, i, padded.get());
    float* const to = p.columns + i * p.taps * p.width;
    for (int64_t n = 0; n < p.taps * p.width; ++n) to[n] = from[p.places[n]];
  }
}

void small_conv(const SmallConvProblem& p, int64_t first_block, int64_t last_block) {
  const int64_t first = first_block * kSmallConvOutputs;
  const int64_t last = std::min(last_block * kSmallConvOutputs, p.shape->outputs);
  const int64_t vectors = p.width / kLanes;
  const Buffer<V> sums((last - first + kOutputs) * vectors);
  const auto each_block = [&](const auto& f) {
    for (int64_t o = first; o < last; o += kOutputs) f(Block(p, o, sums.get() + (o - first) * vectors));
  };
  const int64_t inputs = p.shape->inputs, step = inputs_in_turn(p);
  for (int64_t i = 0; i < inputs; i += step) {
    each_block([&](const Block& block) { block.add(i, std::min(i + step, inputs)); });
  }
  each_block([](const Block& block) { block.write(); });
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
