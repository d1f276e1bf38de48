// SPDX-License-Identifier: Apache-2.0
//
// The lanes of vectors are outputs (and halves), a value of the input is broadcast to them; a block of outputs × inputs
// is summed in registers, over a stretch of points that stays in the second-level cache. Compiled with fused
// multiply-add where there is one: the bits hang on the instruction set, but not on the number of threads.
#include "conv_square.h"

#include <cstring>

#include "../math/simd.h"
#include "buffer.h"
#include "kernels.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

using V = math::FloatV;
constexpr int64_t kLanes = sizeof(V) / sizeof(float);
constexpr int64_t kStretch = 1 << 16;  // elements of grad and input

/// Rows of points, counted through the planes of grad.
struct Stretch {
  int64_t first;
  int64_t last;
};

int64_t stretch_rows(const ConvSquareProblem& p) {
  const int64_t row = p.shape->out[2] * (p.layout->values + p.layout->inputs * p.layout->halves * p.shape->stride[2]);
  return row < kStretch ? kStretch / row : 1;
}

/// One block: `Vectors` vectors of values of grad × `Inputs` inputs, of one example at one tap.
template <int Vectors, int Inputs, bool Halves>
class Block {
 public:
  Block(const ConvSquareProblem& p, int64_t first_value, int64_t first_input)
      : p_(p),
        grad_(p.grad + first_value / kUnitValues * p.layout->grad_block(*p.shape) + first_value % kUnitValues),
        input_(p.input + first_input / kUnitInputs * p.layout->input_block() +
               first_input % kUnitInputs * p.layout->halves) {}

  /// sums[Inputs, Vectors] += Σ grad · input over a stretch.
  void add_products(int64_t example, const ConvTap& tap, const Stretch& rows, V* sums) const {
    const ConvShape& s = *p_.shape;
    const ConvLayout& layout = *p_.layout;
    const int64_t grad_point = layout.grad_point(), point = layout.input_point();
    const int64_t step = s.stride[2] * point, row_step = s.stride[1] * layout.size[2] * point;
    const int64_t plane_step = s.stride[0] * layout.size[1] * layout.size[2] * point;
    const int64_t begin = tap.first[2], count = tap.last[2] - begin;
    const float* const grad = grad_ + example * layout.grad_elements(s) + begin * grad_point;
    const float* const input = input_ + example * layout.input_elements() + tap.offset + begin * step;
    int64_t d = rows.first / s.out[1], h = rows.first % s.out[1] - 1;
    V total[Inputs][Vectors] = {};
    for (int64_t row = rows.first; row < rows.last; ++row) {
      if (++h == s.out[1]) ++d, h = 0;
      if (h < tap.first[1] || h >= tap.last[1] || d < tap.first[0] || d >= tap.last[0]) continue;
      const float* g = grad + row * s.out[2] * grad_point;
      const float* x = input + d * plane_step + h * row_step;
      for (int64_t w = 0; w < count; ++w, g += grad_point, x += step) {
        V factors[Vectors];
        for (int v = 0; v < Vectors; ++v) factors[v] = math::load<V>(g + v * kLanes);
        for (int i = 0; i < Inputs; ++i) {
          const V value = Halves ? math::broadcast_pair(x + 2 * i) : math::broadcast(x + i);
          for (int v = 0; v < Vectors; ++v) total[i][v] += factors[v] * value;
        }
      }
    }
    for (int i = 0; i < Inputs; ++i) {
      for (int v = 0; v < Vectors; ++v) sums[i * Vectors + v] += total[i][v];
    }
  }

  /// squares += sums², sums = 0.
  static void square(V* sums, V* squares) {
    for (int k = 0; k < Inputs * Vectors; ++k) {
      const V sum = Halves ? math::pair_sums(sums[k]) : sums[k];
      squares[k] += sum * sum;
      sums[k] = V{};
    }
  }

 private:
  const ConvSquareProblem& p_;
  const float* grad_;
  const float* input_;
};

/// Adds the squares of a block, [taps, Inputs, Vectors · lanes], to the accumulator.
template <int Vectors, int Inputs>
void write_squares(const ConvSquareProblem& p, const V* squares, int64_t first_value, int64_t first_input,
                   int64_t first_tap, int64_t taps) {
  const ConvShape& s = *p.shape;
  const int64_t halves = p.layout->halves;
  const float* const values = reinterpret_cast<const float*>(squares);
  for (int64_t lane = 0; lane < Vectors * kLanes; lane += halves) {
    const int64_t output = (first_value + lane) / halves;
    if (output >= s.outputs) break;
    for (int64_t i = 0; i < Inputs && first_input + i < s.inputs; ++i) {
      float* const to = p.accumulator + (output * s.inputs + first_input + i) * p.tap_count + first_tap;
      for (int64_t tap = 0; tap < taps; ++tap) {
        to[tap] += p.scale * values[(tap * Inputs + i) * Vectors * kLanes + lane];
      }
    }
  }
}

template <int Vectors, int Inputs, bool Halves>
void square_block(const ConvSquareProblem& p, int64_t first_value, int64_t first_input, int64_t first_tap, V* memory) {
  const int64_t taps = p.shape->kernel[1] * p.shape->kernel[2], sums = taps * Inputs * Vectors;
  V* const squares = memory + sums;
  std::memset(static_cast<void*>(memory), 0, 2 * sums * sizeof(V));
  const Block<Vectors, Inputs, Halves> block(p, first_value, first_input);
  const int64_t rows = p.layout->grad_rows(*p.shape), stretch = stretch_rows(p);
  for (int64_t b = 0; b < p.examples; ++b) {
    for (int64_t row = 0; row < rows; row += stretch) {
      const Stretch part{row, row + stretch < rows ? row + stretch : rows};
      for (int64_t tap = 0; tap < taps; ++tap) {
        block.add_products(b, p.taps[first_tap + tap], part, memory + tap * Inputs * Vectors);
      }
    }
    for (int64_t tap = 0; tap < taps; ++tap) {
      block.square(memory + tap * Inputs * Vectors, squares + tap * Inputs * Vectors);
    }
  }
  write_squares<Vectors, Inputs>(p, squares, first_value, first_input, first_tap, taps);
}

template <int Vectors, int Inputs>
void square_block(const ConvSquareProblem& p, int64_t first_value, int64_t first_input, int64_t first_tap, V* memory) {
  p.layout->halves == 2 ? square_block<Vectors, Inputs, true>(p, first_value, first_input, first_tap, memory)
                        : square_block<Vectors, Inputs, false>(p, first_value, first_input, first_tap, memory);
}

/// The inputs [first, last) of a unit, in blocks for which there are registers.
template <int Vectors>
void square_inputs(const ConvSquareProblem& p, int64_t first_value, int64_t first, int64_t last, int64_t tap,
                   V* memory) {
  constexpr int most = math::kVectorBytes == 64 ? 8 : 4;
  for (int64_t i = first; i < last; i += most) {
    last - i > 4 ? square_block<Vectors, most>(p, first_value, i, tap, memory)
                 : square_block<Vectors, 4>(p, first_value, i, tap, memory);
  }
}

}  // namespace

void conv_square(const ConvSquareProblem& p, int64_t first_unit, int64_t last_unit) {
  const ConvShape& s = *p.shape;
  const int64_t taps = s.kernel[1] * s.kernel[2];
  const Buffer<V> memory(2 * taps * 2 * kUnitInputs);
  const int64_t input_blocks = p.layout->input_blocks();
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t first_tap = unit % s.kernel[0] * taps;
    const int64_t first = unit / s.kernel[0] % input_blocks * kUnitInputs;
    const int64_t last = first + kUnitInputs < p.layout->inputs ? first + kUnitInputs : p.layout->inputs;
    const int64_t begin = unit / s.kernel[0] / input_blocks * kUnitValues;
    const int64_t end = begin + kUnitValues < p.layout->values ? begin + kUnitValues : p.layout->values;
    for (int64_t value = begin; value < end; value += 2 * kLanes) {
      end - value > kLanes ? square_inputs<2>(p, value, first, last, first_tap, memory.get())
                           : square_inputs<1>(p, value, first, last, first_tap, memory.get());
    }
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
