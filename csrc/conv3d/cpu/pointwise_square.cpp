// SPDX-License-Identifier: Apache-2.0
//
// The lanes of vectors are points, whose products are summed for a tile of outputs × inputs at once; lanes are added in
// float64. Compiled with fused multiply-add where there is one: the bits hang on the instruction set, but not on the
// number of threads.
#include "conv3d/cpu/pointwise_square.h"

#include <cstring>

#include "cpu/lanes.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int kOutputs = 4;  // of a tile, for which, times its inputs, there are registers
constexpr int kInputs = math::kVectorBytes == 64 ? 6 : 2;

/// The products of a chunk of an example.
class Chunk {
 public:
  Chunk(const PointwiseProblem& p, int64_t unit)
      : p_(p),
        first_(unit % p.chunks() * p.chunk),
        count_(smaller_of(p.chunk, p.points - first_)),
        grad_(p.grad + unit / p.chunks() * p.outputs * p.points + first_),
        input_(p.input + unit / p.chunks() * p.inputs * p.points + first_),
        sums_(p.sums + unit * p.outputs * p.inputs) {}

  void write() const {
    for (int64_t o = 0; o < p_.outputs; o += kOutputs) {
      for (int64_t i = 0; i < p_.inputs; i += kInputs) write_tile(o, i);
    }
  }

 private:
  void write_tile(int64_t output, int64_t input) const {
    const float *grads[kOutputs], *inputs[kInputs];  // what lies beyond the last channel is that one
    for (int o = 0; o < kOutputs; ++o) grads[o] = grad_ + smaller_of(output + o, p_.outputs - 1) * p_.points;
    for (int i = 0; i < kInputs; ++i) inputs[i] = input_ + smaller_of(input + i, p_.inputs - 1) * p_.points;
    V sums[kOutputs][kInputs] = {};
    int64_t point = 0;
    for (; point + kLanes <= count_; point += kLanes) {
      add(
          sums, [&](int o) { return math::load<V>(grads[o] + point); },
          [&](int i) { return math::load<V>(inputs[i] + point); });
    }
    if (point < count_) {
      add(
          sums, [&](int o) { return part(grads[o] + point, count_ - point); },
          [&](int i) { return part(inputs[i] + point, count_ - point); });
    }
    for (int64_t o = 0; o < smaller_of(kOutputs, p_.outputs - output); ++o) {
      for (int64_t i = 0; i < smaller_of(kInputs, p_.inputs - input); ++i) {
        sums_[(output + o) * p_.inputs + input + i] = total(sums[o][i]);
      }
    }
  }

  template <class Grad, class Input>
  TIMM_EXT_FN static void add(V (&sums)[kOutputs][kInputs], const Grad& grad, const Input& input) {
    V grads[kOutputs];
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) grads[o] = grad(o);
#pragma GCC unroll 6
    for (int i = 0; i < kInputs; ++i) {
      const V factor = input(i);
#pragma GCC unroll 4
      for (int o = 0; o < kOutputs; ++o) sums[o][i] += grads[o] * factor;
    }
  }

  /// The first elements of a vector, zeros behind.
  static V part(const float* from, int64_t count) {
    V v{};
    std::memcpy(&v, from, count * sizeof(float));
    return v;
  }

  static float total(V lanes) {
    float values[kLanes];
    math::store(values, lanes);
    double chains[4] = {};
    for (int64_t lane = 0; lane < kLanes; ++lane) chains[lane % 4] += values[lane];
    return static_cast<float>((chains[0] + chains[1]) + (chains[2] + chains[3]));
  }

  const PointwiseProblem& p_;
  int64_t first_;  // point
  int64_t count_;
  const float* grad_;
  const float* input_;
  float* sums_;
};

}  // namespace

void pointwise_products(const PointwiseProblem& p, int64_t first_chunk, int64_t last_chunk) {
  for (int64_t unit = first_chunk; unit < last_chunk; ++unit) Chunk(p, unit).write();
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
