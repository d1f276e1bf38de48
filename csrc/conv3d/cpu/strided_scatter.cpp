// SPDX-License-Identifier: Apache-2.0
//
// The lanes of vectors are points of the input, whose products with each tap are scattered over rows, columns and
// planes of the output afterwards. Compiled with fused multiply-add where there is one: the bits hang on the
// instruction set, but not on the number of threads.
#include <cstring>

#include "conv3d/cpu/kernels.h"
#include "conv3d/cpu/tile.h"
#include "cpu/buffer.h"
#include "math/shuffle.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int64_t kChain = 256;  // channels of the input that are summed by themselves: long chains round more
constexpr int kOutputs = kTileOutputs;
constexpr int64_t kPlaneTaps = 9;
constexpr int64_t kPoints = 64;  // of which as many planes are taken together as have them

/// Products of some outputs at some planes of the input, and where they go.
class Scatter {
 public:
  static int64_t elements(const StridedConvProblem& p) {
    return p.inputs * width(p) + held(p) * kPlaneTaps * kOutputs * width(p) + row_elements(p);
  }

  Scatter(const StridedConvProblem& p, float* memory)
      : p_(p),
        plane_(p.small[1] * p.small[2]),
        width_(width(p)),
        points_(memory),
        products_(points_ + p.inputs * width_),
        zeros_(products_ + held(p) * kPlaneTaps * kOutputs * width_ + 1) {
    std::memset(zeros_ - 1, 0, row_elements(p) * sizeof(float));
  }

  /// Planes [first, last) of the input to those of the output that belong to them.
  void run(int64_t example, int64_t first_output, int64_t first, int64_t last) {
    first_output_ = first_output;
    input_ = p_.input + example * p_.inputs * p_.points();
    output_ = p_.output + (example * p_.outputs + first_output) * p_.large_points();
    first_plane_ = 2 * first;
    last_plane_ = smaller_of(2 * last, p_.large[0]);
    if (first > 0 && p_.upsampled) run_group(first - 1, 1, 2, 3);
    for (int64_t plane = first; plane < last; plane += group(p_)) {
      run_group(plane, smaller_of(group(p_), last - plane), 0, 3);
    }
    if (last < p_.small[0]) run_group(last, 1, 0, 1);
  }

 private:
  /// Planes that are multiplied together.
  static int64_t group(const StridedConvProblem& p) {
    return larger_of(1, smaller_of(kPoints / (p.small[1] * p.small[2]), p.small[0]));
  }

  /// Planes of the kernel whose products are held.
  static int64_t held(const StridedConvProblem& p) { return group(p) == 1 ? 1 : 3; }

  static int64_t width(const StridedConvProblem& p) {
    return whole_vectors(group(p) * p.small[1] * p.small[2]) + kLanes;
  }

  /// Of a row of zeros, from the column before the first to the one behind the last vector.
  static int64_t row_elements(const StridedConvProblem& p) { return whole_vectors(p.small[2]) + kLanes; }

  /// Some planes at planes [first_tap, last_tap) of the kernel, whose sums are added up plane by plane.
  void run_group(int64_t plane, int64_t count, int64_t first_tap, int64_t last_tap) {
    copy_points(plane, count);
    const int64_t next = held(p_) == 1 ? 0 : kPlaneTaps * kOutputs * width_;
    for (int64_t tap = first_tap; next > 0 && tap < last_tap; ++tap) make_products(count, tap, products_ + tap * next);
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t tap = first_tap; tap < last_tap; ++tap) {
        if (next == 0) make_products(count, tap, products_);
        from_ = products_ + tap * next + n * plane_;
        const int64_t outputs = smaller_of(kOutputs, p_.outputs - first_output_);
        for (int64_t o = 0; o < outputs; ++o) scatter_plane(plane + n, o, tap);
      }
    }
  }

  /// Side by side: in the image, channels may lie a multiple of a cache's size apart.
  void copy_points(int64_t plane, int64_t count) const {
    const float* const from = input_ + plane * plane_;
    const int64_t points = count * plane_, empty = whole_vectors(points) - points;
    for (int64_t i = 0; i < p_.inputs; ++i) {
      std::memcpy(points_ + i * width_, from + i * p_.points(), points * sizeof(float));
      std::memset(points_ + i * width_ + points, 0, empty * sizeof(float));
    }
  }

  void make_products(int64_t count, int64_t plane_tap, float* to) const {
    const float* weights = p_.weights + first_output_ / kStridedOutputs * strided_block_elements(p_.inputs);
    weights += first_output_ % kStridedOutputs + plane_tap * kPlaneTaps * strided_tap_step(p_.inputs);
    const int64_t points = whole_vectors(count * plane_);
    for (int64_t tap = 0; tap < kPlaneTaps; ++tap, to += kOutputs * width_) {
      int64_t at = 0;
      for (; at + 2 * kLanes <= points; at += 2 * kLanes) write_vectors<2>(at, weights, to + at);
      if (at < points) write_vectors<1>(at, weights, to + at);
      weights += strided_tap_step(p_.inputs);
    }
  }

  /// Chains are added up where they are written: for two tiles there are not everywhere registers.
  template <int Vectors>
  void write_vectors(int64_t place, const float* weights, float* to) const {
    for (int64_t i = 0; i < p_.inputs; i += kChain, weights += kChain * kStridedOutputs) {
      V chain[kOutputs][Vectors] = {};
      const float* const points = points_ + i * width_ + place;
      add_products(
          smaller_of(kChain, p_.inputs - i),
          [&](int64_t k, int o) { return math::broadcast(weights + k * kStridedOutputs + o); },
          [&](int64_t k, int v) { return math::load<V>(points + k * width_ + v * kLanes); }, chain);
      for (int o = 0; o < kOutputs; ++o) {
        for (int v = 0; v < Vectors; ++v) {
          float* const at = to + o * width_ + v * kLanes;
          math::store(at, (i == 0 ? V{} : math::load<V>(at)) + chain[o][v]);
        }
      }
    }
  }

  /// The products of one plane of the input at one plane of the kernel.
  void scatter_plane(int64_t plane, int64_t output, int64_t plane_tap) const {
    float* planes[2];  // of the output
    bool first[2];     // whether nothing was added to it before
    int64_t count = 0;
    const float bias = p_.bias != nullptr ? p_.bias[first_output_ + output] : 0;
    const int64_t odd = 2 * plane + plane_tap - 1;
    for (int64_t d = odd; d <= odd + (p_.upsampled ? 1 : 0); ++d) {
      if (d < first_plane_ || d >= last_plane_) continue;
      planes[count] = output_ + (output * p_.large[0] + d) * p_.large[1] * p_.large[2];
      first[count++] = comes_first(d, plane_tap);
    }
    for (int64_t row = 0; count > 0 && row < p_.large[1]; ++row) {
      const Sources sources = p_.upsampled ? sources_of<true>(output, row) : sources_of<false>(output, row);
      for (int64_t w = 0; w < p_.small[2]; w += kLanes) {
        V parts[2];
        p_.upsampled ? join<true>(sources, w, parts) : join<false>(sources, w, parts);
        for (int64_t n = 0; n < count; ++n) write_parts(parts, first[n], bias, planes[n], 2 * w);
      }
      for (int64_t n = 0; n < count; ++n) planes[n] += p_.large[2];
    }
  }

  bool comes_first(int64_t plane, int64_t plane_tap) const {
    if (!p_.upsampled) return plane_tap != 0;
    return plane_tap == (plane % 2 == 1 ? 1 : plane > 0 ? 2 : 0);
  }

  /// Products at a place of the kernel, of a row of the input.
  const float* row_at(int64_t output, int64_t row_tap, int64_t column_tap, int64_t row) const {
    if (row < 0 || row >= p_.small[1]) return zeros_;
    return from_ + ((3 * row_tap + column_tap) * kOutputs + output) * width_ + row * p_.small[2];
  }

  /// Rows of products whose sums make a row of the output, for each column of the kernel.
  struct Sources {
    const float* rows[3][3];
  };

  template <bool Upsampled>
  Sources sources_of(int64_t output, int64_t row) const {
    const int64_t half = row / 2;
    Sources sources;
    for (int64_t column = 0; column < 3; ++column) {
      const auto at = [&](int64_t tap, int64_t of) { return row_at(output, tap, column, of); };
      const float*(&to)[3] = sources.rows[column];
      if (row % 2 == 0) {
        to[0] = at(1, half), to[1] = Upsampled ? at(2, half - 1) : zeros_, to[2] = at(0, half);
      } else {
        to[0] = at(2, half), to[1] = at(0, half + 1), to[2] = at(1, half);
      }
    }
    return sources;
  }

  /// Their sum from a column on; not upsampled, of two of them.
  template <bool Upsampled>
  static V sum(const float* const (&rows)[3], int64_t column) {
    const V two = math::load<V>(rows[0] + column) + math::load<V>(rows[1] + column);
    return Upsampled ? two + math::load<V>(rows[2] + column) : two;
  }

  /// Two vectors of a row of the output, of products from a column on.
  template <bool Upsampled>
  void join(const Sources& sources, int64_t column, V (&to)[2]) const {
    const auto& [first, middle, last] = sources.rows;
    const V next_first = math::join_lanes(sum<Upsampled>(first, column + 1), V{}, p_.small[2] - 1 - column);
    V even = sum<Upsampled>(middle, column), odd = sum<Upsampled>(last, column) + next_first;
    if (Upsampled) {
      const V last_before = sum<Upsampled>(last, column - 1);
      odd += even;
      even += sum<Upsampled>(first, column) + (column > 0 ? last_before : math::join_lanes(V{}, last_before, 1));
    }
    math::put_together(even, odd, to[0], to[1]);
  }

  /// To a row of the output, from a column on.
  void write_parts(const V (&parts)[2], bool first, float bias, float* row, int64_t column) const {
    for (const V part : parts) {
      float* const to = row + column;
      if (column + kLanes <= p_.large[2]) {
        math::store(to, part + (first ? V{} + bias : math::load<V>(to)));
      } else {
        const float* const from = reinterpret_cast<const float*>(&part);
        for (int64_t w = 0; column + w < p_.large[2]; ++w) to[w] = from[w] + (first ? bias : to[w]);
      }
      column += kLanes;
    }
  }

  const StridedConvProblem& p_;
  int64_t plane_;                // points
  int64_t width_;                // from the points of a channel to the next, and their products
  float* points_;                // [inputs, width] of some planes
  float* products_;              // [planes of the kernel held, rows, columns, outputs, width]
  float* zeros_;                 // a row
  const float* from_ = nullptr;  // products of a plane
  int64_t first_output_ = 0;
  const float* input_ = nullptr;
  float* output_ = nullptr;
  int64_t first_plane_ = 0;  // of the output
  int64_t last_plane_ = 0;
};

}  // namespace

void strided_scatter(const StridedConvProblem& p, int64_t first_unit, int64_t last_unit) {
  const Buffer<float> memory(Scatter::elements(p));
  Scatter scatter(p, memory.get());
  const int64_t chunks = scatter_chunks(p), blocks = strided_blocks(p.outputs);
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t first = unit % chunks * p.chunk, last = smaller_of(first + p.chunk, p.small[0]);
    const int64_t output = unit / chunks % blocks * kStridedOutputs;
    for (int64_t o = output; o < smaller_of(output + kStridedOutputs, p.outputs); o += kOutputs) {
      scatter.run(unit / chunks / blocks, o, first, last);
    }
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
