// SPDX-License-Identifier: Apache-2.0
//
// The lanes of vectors are points of a plane of the output, one row after another. For these to lie side by side at
// every tap, rows of the input are taken apart into the columns that each tap of a row meets. Compiled with fused
// multiply-add where there is one: the bits hang on the instruction set, but not on the number of threads.
#include <cstring>

#include "conv3d/cpu/kernels.h"
#include "conv3d/cpu/tile.h"
#include "cpu/buffer.h"
#include "math/shuffle.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int64_t kChain = 16;  // channels of the input that are summed by themselves: long chains round more
constexpr int kOutputs = kTileOutputs;
constexpr int64_t kSlots = 3;  // planes of the input that one of the output meets

/// The planes that a plane of the output meets, of all channels: [inputs, slots, columns of the kernel, parity of the
/// row, rows, columns]. Rows are written in whole vectors, whose last elements the next row covers.
class Planes {
 public:
  static int64_t elements(const StridedConvProblem& p) {
    return row_elements(p) + p.inputs * kSlots * 6 * array_elements(p) + kLanes;
  }

  Planes(const StridedConvProblem& p, float* memory)
      : p_(p),
        array_(array_elements(p)),
        last_safe_(p.input + p.examples * p.inputs * p.large_points() - row_elements(p)),
        copy_(memory),
        planes_(memory + row_elements(p)) {
    std::memset(memory, 0, elements(p) * sizeof(float));
  }

  /// Makes those of a plane of the output; of the one before it, the last is there already.
  void make(int64_t example, int64_t plane, bool after_another) {
    for (int64_t i = 0; i < p_.inputs; ++i) {
      for (int64_t d = after_another ? 1 : 0; d < 3; ++d) make_plane(example, i, 2 * plane + d);
    }
    for (int64_t tap = 0; tap < kStridedTaps; ++tap) {
      const int64_t row = tap / 3 % 3;
      const int64_t array = (slot(2 * plane + tap / 9) * 3 + tap % 3) * 2 + row % 2;
      offsets_[tap] = array * array_ + row / 2 * p_.small[2];
    }
  }

  const float* channel(int64_t input) const { return planes_ + input * kSlots * 6 * array_; }
  int64_t offset(int64_t tap) const { return offsets_[tap]; }

 private:
  /// Of the rows of one parity at a column of the kernel.
  static int64_t array_elements(const StridedConvProblem& p) { return (p.small[1] + 1) * p.small[2] + kLanes; }

  /// Of a row of the input in whole pairs of vectors, and one pair more.
  static int64_t row_elements(const StridedConvProblem& p) { return 2 * whole_vectors(p.small[2]) + 2 * kLanes; }

  /// Planes of even number take turns.
  static int64_t slot(int64_t plane) { return plane % 2 == 1 ? 1 : plane / 2 % 2 * 2; }

  void make_plane(int64_t example, int64_t input, int64_t plane) const {
    const float* from =
        p_.input + (example * p_.inputs + input) * p_.large_points() + plane * p_.large[1] * p_.large[2];
    float* const to = planes_ + (input * kSlots + slot(plane)) * 6 * array_;
    for (int64_t row = 0; row < p_.large[1]; ++row, from += p_.large[2]) {
      take_row_apart(safe(from), to + row % 2 * array_ + row / 2 * p_.small[2]);
    }
  }

  /// A row of the input from which whole vectors may be read beyond its end.
  const float* safe(const float* row) const {
    if (row <= last_safe_) return row;
    std::memcpy(copy_, row, p_.large[2] * sizeof(float));
    return copy_;
  }

  /// A row to the columns that each of the kernel's meets.
  void take_row_apart(const float* from, float* to) const {
    for (int64_t w = 0; w < p_.small[2]; w += kLanes, from += 2 * kLanes) {
      V even, odd, next;
      math::take_apart(math::load<V>(from), math::load<V>(from + kLanes), even, odd);
      math::store(to + w, even);
      math::store(to + 2 * array_ + w, odd);
      math::take_apart(math::load<V>(from + 2), math::load<V>(from + 2 + kLanes), next, odd);
      math::store(to + 4 * array_ + w, next);
    }
  }

  const StridedConvProblem& p_;
  int64_t array_;
  const float* last_safe_;  // row of the input
  float* copy_;             // of a row
  float* planes_;
  int64_t offsets_[kStridedTaps];
};

/// Some outputs at the points of a plane.
class Block {
 public:
  Block(const StridedConvProblem& p, const Planes& planes, int64_t first, float* output)
      : p_(p), planes_(planes), first_(first), output_(output), points_(p.small[1] * p.small[2]) {
    weights_ = p.weights + first / kStridedOutputs * strided_block_elements(p.inputs) + first % kStridedOutputs;
  }

  void write() const {
    const int64_t vectors = (points_ + kLanes - 1) / kLanes;
    int64_t v = 0;
    for (; v + 2 <= vectors; v += 2) write_vectors<2>(place(v, 2));
    if (v < vectors) write_vectors<1>(place(v, 1));
  }

 private:
  /// Of some vectors, which may overlap those before.
  int64_t place(int64_t vector, int64_t vectors) const {
    return larger_of(0, smaller_of(vector * kLanes, points_ - vectors * kLanes));
  }

  template <int Vectors>
  void write_vectors(int64_t place) const {
    V sums[kOutputs][Vectors] = {};
    for (int64_t i = 0; i < p_.inputs; i += kChain) {
      V chain[kOutputs][Vectors] = {};
      for (int64_t input = i; input < smaller_of(i + kChain, p_.inputs); ++input) add_input(input, place, chain);
      add_sums(chain, sums);
    }
    const int64_t outputs = smaller_of(kOutputs, p_.outputs - first_);
    for (int64_t o = 0; o < outputs; ++o) {
      for (int v = 0; v < Vectors; ++v) {
        float* const to = output_ + o * p_.points() + place + v * kLanes;
        const int64_t left = points_ - place - v * kLanes;
        if (left >= kLanes) {
          math::store(to, sums[o][v]);
        } else {
          std::memcpy(to, &sums[o][v], left * sizeof(float));
        }
      }
    }
  }

  template <int Vectors>
  void add_input(int64_t input, int64_t place, V (&chain)[kOutputs][Vectors]) const {
    const float* const weights = weights_ + input * kStridedTaps * kStridedOutputs;
    const float* const channel = planes_.channel(input) + place;
    add_products(
        kStridedTaps, [&](int64_t tap, int o) { return math::broadcast(weights + tap * kStridedOutputs + o); },
        [&](int64_t tap, int v) { return math::load<V>(channel + planes_.offset(tap) + v * kLanes); }, chain);
  }

  const StridedConvProblem& p_;
  const Planes& planes_;
  int64_t first_;
  float* output_;
  int64_t points_;
  const float* weights_;
};

}  // namespace

void strided_gather(const StridedConvProblem& p, int64_t first_unit, int64_t last_unit) {
  const Buffer<float> memory(Planes::elements(p));
  Planes planes(p, memory.get());
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t example = unit / p.small[0], plane = unit % p.small[0];
    planes.make(example, plane, unit > first_unit && plane > 0);
    for (int64_t o = 0; o < p.outputs; o += kOutputs) {
      float* const output = p.output + (example * p.outputs + o) * p.points() + plane * p.small[1] * p.small[2];
      Block(p, planes, o, output).write();
    }
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
