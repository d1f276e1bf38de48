// SPDX-License-Identifier: Apache-2.0
//
// The lanes of vectors are outputs (and halves), a value of the input is broadcast to them; a block of outputs × inputs
// is summed in registers, over a stretch of points that stays in the second-level cache. Compiled with fused
// multiply-add where there is one: the bits hang on the instruction set, but not on the number of threads.
#include <cstring>

#include "buffer.h"
#include "conv_square_rows.h"
#include "kernels.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int64_t kStretch = 1 << 17;  // elements of grad and input

/// Rows of points, counted through the planes of grad.
struct Stretch {
  int64_t first;
  int64_t last;
};

int64_t stretch_rows(const ConvSquareProblem& p) {
  const int64_t point = p.layout->values + p.layout->inputs * p.layout->halves * p.shape->stride[2];
  const int64_t row = p.layout->forms() * p.shape->out[2] * point;
  return row < kStretch ? kStretch / row : 1;
}

/// One block of one example.
template <class B>
class Block {
 public:
  Block(const ConvSquareProblem& p, int64_t first_value, int64_t first_input)
      : p_(p),
        grad_(p.grad + first_value / kUnitValues * p.layout->grad_block(*p.shape) + first_value % kUnitValues),
        input_(p.input + first_input / kUnitInputs * p.layout->input_block() +
               first_input % kUnitInputs * p.layout->halves) {}

  /// to[taps, inputs, vectors] += Σ grad · input over a stretch, from a tap on.
  void add_products(int64_t example, const ConvTap& tap, const Stretch& rows, V* to) const {
    const ConvShape& s = *p_.shape;
    const ConvLayout& layout = *p_.layout;
    const RowPoints points = points_at(tap);
    const int64_t grad_row = layout.grad_row(s), input_row = layout.input_row();
    const float* const grad = grad_ + example * layout.grad_elements(s) + tap.grad;
    const float* const input = input_ + example * layout.input_elements() + tap.input;
    int64_t d = rows.first / layout.rows, h = rows.first % layout.rows - 1;
    typename B::Sums sums = {};
    for (int64_t row = rows.first; row < rows.last; ++row) {
      if (++h == layout.rows) ++d, h = 0;
      if (h < tap.first[1] || h >= tap.last[1] || d < tap.first[0] || d >= tap.last[0]) continue;
      const float* const x = input + (d * s.stride[0] * layout.size[1] + h * s.stride[1]) * input_row;
      if constexpr (B::kTaps == 3) {
        add_row_of_three<B>(grad + row * grad_row, x, points, sums);
      } else {
        add_row_of_one<B>(grad + row * grad_row, x, points, sums);
      }
    }
    for (int k = 0; k < B::kTaps; ++k) {
      for (int i = 0; i < B::kInputs; ++i) {
        for (int v = 0; v < B::kVectors; ++v, ++to) *to += sums[k][i][v];
      }
    }
  }

  /// Brings the sums of forms, [forms, columns], to those of the kernel's rows; the last form's are 0 then.
  static void combine(V* sums, int64_t columns) {
    const int64_t next = columns * B::kSums;
    for (int64_t k = 0; k < next; ++k, ++sums) {
      const V half_sum = 0.5f * (sums[next] + sums[2 * next]), half_difference = 0.5f * (sums[next] - sums[2 * next]);
      sums[0] += half_sum;
      sums[next] = half_difference;
      sums[2 * next] = half_sum + sums[3 * next];
      sums[3 * next] = V{};
    }
  }

  /// squares += sums², sums = 0, of one tap.
  static void square(V* sums, V* squares) {
    for (int k = 0; k < B::kSums; ++k) {
      const V sum = B::kHalves ? math::pair_sums(sums[k]) : sums[k];
      squares[k] += sum * sum;
      sums[k] = V{};
    }
  }

 private:
  RowPoints points_at(const ConvTap& tap) const {
    const ConvShape& s = *p_.shape;
    const int64_t grad_step = p_.layout->grad_point(), input_step = s.stride[2] * p_.layout->input_point();
    if (B::kTaps == 1) return {s.out[2], tap.first[2], tap.last[2], grad_step, input_step};
    const int64_t size = p_.layout->size[2], last = s.padding[2] + s.in[2];
    return {s.out[2], s.padding[2] < size ? s.padding[2] : size, last < size ? last : size, grad_step, input_step};
  }

  const ConvSquareProblem& p_;
  const float* grad_;
  const float* input_;
};

/// to += scale · values, of which there are up to four.
TIMM_EXT_FN void add_scaled(math::FloatQuad values, float scale, int64_t count, float* to) {
  if (count == 4) {
    math::store(to, math::load<math::FloatQuad>(to) + scale * values);
  } else {
    for (int64_t k = 0; k < count; ++k) to[k] += scale * values[k];
  }
}

/// Adds the squares of a block at a plane of the kernel, [taps, inputs, vectors · lanes], to the accumulator.
template <class B>
void write_squares(const ConvSquareProblem& p, const V* squares, int64_t first_value, int64_t first_input,
                   int64_t plane) {
  const ConvShape& s = *p.shape;
  const int64_t taps = s.kernel[1] * s.kernel[2];
  constexpr int64_t halves = B::kHalves ? 2 : 1;
  const int64_t row = s.inputs * s.kernel[0] * taps;  // of an output
  const int64_t inputs = first_input + B::kInputs < s.inputs ? B::kInputs : s.inputs - first_input;
  for (int64_t lane = 0; lane < B::kVectors * kLanes; lane += 4) {
    const int64_t output = (first_value + lane) / halves;
    const int64_t outputs = output + 4 / halves < s.outputs ? 4 / halves : s.outputs - output;
    float* const to = p.accumulator + output * row + (first_input * s.kernel[0] + plane) * taps;
    for (int64_t i = 0; i < inputs; ++i) {
      const float* const from = reinterpret_cast<const float*>(squares + i * B::kVectors) + lane;
      for (int64_t tap = 0; tap < taps; tap += 4) {
        const int64_t count = tap + 4 < taps ? 4 : taps - tap;
        math::FloatQuad four[4] = {};
        for (int64_t k = 0; k < count; ++k) four[k] = math::load<math::FloatQuad>(from + (tap + k) * B::kSums * kLanes);
        math::transpose(four);
        for (int64_t k = 0; k < outputs; ++k) {
          add_scaled(four[k * halves], p.scale, count, to + k * row + i * s.kernel[0] * taps + tap);
        }
      }
    }
  }
}

template <class B>
void square_block(const ConvSquareProblem& p, int64_t first_value, int64_t first_input, int64_t plane, V* memory) {
  const int64_t columns = p.shape->kernel[2], taps = p.shape->kernel[1] * columns;
  const int64_t summed = p.layout->row_taps * columns;
  V* const squares = memory + summed * B::kSums;
  std::memset(static_cast<void*>(memory), 0, (summed + taps) * B::kSums * sizeof(V));
  const Block<B> block(p, first_value, first_input);
  const int64_t rows = p.layout->grad_rows(), stretch = stretch_rows(p);
  for (int64_t b = 0; b < p.examples; ++b) {
    for (int64_t row = 0; row < rows; row += stretch) {
      const Stretch part{row, row + stretch < rows ? row + stretch : rows};
      for (int64_t tap = 0; tap < summed; tap += B::kTaps) {
        block.add_products(b, p.taps[plane * summed + tap], part, memory + tap * B::kSums);
      }
    }
    if (p.layout->pairs) block.combine(memory, columns);
    for (int64_t tap = 0; tap < taps; ++tap) block.square(memory + tap * B::kSums, squares + tap * B::kSums);
  }
  write_squares<B>(p, squares, first_value, first_input, plane);
}

template <int Taps, int Vectors, int Inputs>
void square_block(const ConvSquareProblem& p, int64_t first_value, int64_t first_input, int64_t plane, V* memory) {
  p.layout->halves == 2
      ? square_block<BlockOf<Taps, Vectors, Inputs, true>>(p, first_value, first_input, plane, memory)
      : square_block<BlockOf<Taps, Vectors, Inputs, false>>(p, first_value, first_input, plane, memory);
}

/// Whether three taps at a time pay: with 32 registers, and rows that are longer than what is lost at their ends.
bool takes_three(const ConvShape& s) {
  constexpr int64_t least = 8;
  return math::kVectorBytes == 64 && s.kernel[2] == 3 && s.stride[2] == 1 && s.dilation[2] == 1 && s.out[2] >= least;
}

/// The inputs [first, last) of a unit, in blocks for which there are registers.
template <int Vectors>
void square_inputs(const ConvSquareProblem& p, int64_t first_value, int64_t first, int64_t last, int64_t plane,
                   V* memory) {
  const bool three = takes_three(*p.shape);
  const int most = math::kVectorBytes < 64 || (three && Vectors == 2) ? 4 : 8;
  for (int64_t i = first; i < last; i += most) {
    const bool eight = most == 8 && last - i > 4;
    if constexpr (math::kVectorBytes == 64) {
      if (three && eight && Vectors == 1) {
        square_block<3, 1, 8>(p, first_value, i, plane, memory);
      } else if (three) {
        square_block<3, Vectors, 4>(p, first_value, i, plane, memory);
      } else if (eight) {
        square_block<1, Vectors, 8>(p, first_value, i, plane, memory);
      }
    }
    if (!three && !eight) square_block<1, Vectors, 4>(p, first_value, i, plane, memory);
  }
}

}  // namespace

void conv_square(const ConvSquareProblem& p, int64_t first_unit, int64_t last_unit) {
  const ConvShape& s = *p.shape;
  const Buffer<V> memory((p.layout->row_taps + s.kernel[1]) * s.kernel[2] * 2 * kUnitInputs);
  const int64_t input_blocks = p.layout->input_blocks();
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t plane = unit % s.kernel[0];
    const int64_t first = unit / s.kernel[0] % input_blocks * kUnitInputs;
    const int64_t last = first + kUnitInputs < p.layout->inputs ? first + kUnitInputs : p.layout->inputs;
    const int64_t begin = unit / s.kernel[0] / input_blocks * kUnitValues;
    const int64_t end = begin + kUnitValues < p.layout->values ? begin + kUnitValues : p.layout->values;
    for (int64_t value = begin; value < end; value += 2 * kLanes) {
      end - value > kLanes ? square_inputs<2>(p, value, first, last, plane, memory.get())
                           : square_inputs<1>(p, value, first, last, plane, memory.get());
    }
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
