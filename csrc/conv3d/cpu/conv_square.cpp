// SPDX-License-Identifier: Apache-2.0
//
// The lanes of vectors are outputs (and halves), a value of the input is broadcast to them; a block of outputs × inputs
// is summed in registers, over a stretch of points that stays in the second-level cache. Compiled with fused
// multiply-add where there is one: the bits hang on the instruction set, but not on the number of threads.
#include <cstring>

#include "conv3d/cpu/conv_square_block.h"
#include "conv3d/cpu/kernels.h"
#include "cpu/buffer.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

/// The planes of the kernel whose squares a unit writes.
struct KernelPlanes {
  int64_t first;
  int64_t count;
};

/// Whole examples, their squares, or they themselves, added up before they are written.
struct SquareExamples {
  const ConvSquareProblem& p;
  KernelPlanes planes;
  V* memory;

  template <class B>
  void run(int64_t first_value, int64_t first_input) const {
    const ConvShape& s = *p.shape;
    const int64_t columns = s.kernel[2], plane = s.kernel[1] * columns;
    const int64_t plane_taps = p.layout->row_taps * columns;
    const int64_t taps = (p.layout->pairs ? p.layout->plane_taps : 1) * plane_taps;
    V* const totals = memory + taps * B::kSums;
    std::memset(static_cast<void*>(memory), 0, (taps + planes.count * plane) * B::kSums * sizeof(V));
    const Block<B> block(p, first_value, first_input);
    for (int64_t b = 0; b < p.examples; ++b) {
      block.add_taps(b, planes.first * plane_taps, planes.first * plane_taps + taps, memory);
      if (!p.squared && b + 1 < p.examples) continue;
      if (p.layout->pairs) block.combine(memory);
      block.take(memory, planes.count, totals);
    }
    for (int64_t d = 0; d < planes.count; ++d) block.write(totals + d * plane * B::kSums, planes.first + d);
  }

  static int64_t vectors(const ConvSquareProblem& p) {
    const int64_t planes = p.layout->pairs ? p.layout->plane_taps : 1;
    return planes * (p.layout->row_taps + p.shape->kernel[1]) * p.shape->kernel[2] * 2 * kUnitInputs;
  }
};

/// Where the sums of a block over slabs are, [plane forms, row forms, columns, inputs, vectors].
template <class B>
V* slab_sums(const ConvSquareProblem& p, int64_t first_value, int64_t first_input) {
  const int64_t taps = p.layout->plane_taps * p.layout->row_taps * p.shape->kernel[2];
  const int64_t before = first_value / kLanes * p.layout->inputs + first_input * B::kVectors;
  return reinterpret_cast<V*>(p.sums) + taps * before;
}

/// A slab of one example, at a plane form.
struct AddSlab {
  const ConvSquareProblem& p;
  int64_t plane;

  template <class B>
  void run(int64_t first_value, int64_t first_input) const {
    const int64_t taps = p.layout->row_taps * p.shape->kernel[2];
    V* const sums = slab_sums<B>(p, first_value, first_input) + plane * taps * B::kSums;
    Block<B>(p, first_value, first_input).add_taps(0, plane * taps, (plane + 1) * taps, sums);
  }
};

/// An example whose slabs were all added.
struct SquareSums {
  const ConvSquareProblem& p;
  V* memory;

  template <class B>
  void run(int64_t first_value, int64_t first_input) const {
    const int64_t planes = p.shape->kernel[0], plane = p.shape->kernel[1] * p.shape->kernel[2] * B::kSums;
    std::memset(static_cast<void*>(memory), 0, planes * plane * sizeof(V));
    V* const sums = slab_sums<B>(p, first_value, first_input);
    const Block<B> block(p, first_value, first_input);
    block.combine(sums);
    block.take(sums, planes, memory);
    for (int64_t d = 0; d < planes; ++d) block.write(memory + d * plane, d);
  }

  static int64_t vectors(const ConvSquareProblem& p) {
    return p.shape->kernel[0] * p.shape->kernel[1] * p.shape->kernel[2] * 2 * kUnitInputs;
  }
};

/// Whether three taps at a time pay: with 32 registers, and rows that are longer than what is lost at their ends.
bool takes_three(const ConvShape& s) {
  constexpr int64_t least = 8;
  return math::kVectorBytes == 64 && s.kernel[2] == 3 && s.stride[2] == 1 && s.dilation[2] == 1 && s.out[2] >= least;
}

template <int Taps, int Vectors, int Inputs, class Task>
void run_block(const Task& task, int64_t first_value, int64_t first_input) {
  if (task.p.layout->halves == 2) {
    task.template run<BlockOf<Taps, Vectors, Inputs, true>>(first_value, first_input);
  } else {
    task.template run<BlockOf<Taps, Vectors, Inputs, false>>(first_value, first_input);
  }
}

/// The inputs [first, last) of a unit, in blocks for which there are registers.
template <int Vectors, class Task>
void run_inputs(const Task& task, int64_t first_value, int64_t first, int64_t last) {
  const bool three = takes_three(*task.p.shape);
  const int most = math::kVectorBytes < 64 || (three && Vectors == 2) ? 4 : 8;
  for (int64_t i = first; i < last; i += most) {
    const bool eight = most == 8 && last - i > 4;
    if constexpr (math::kVectorBytes == 64) {
      if (three && eight && Vectors == 1) {
        run_block<3, 1, 8>(task, first_value, i);
      } else if (three) {
        run_block<3, Vectors, 4>(task, first_value, i);
      } else if (eight) {
        run_block<1, Vectors, 8>(task, first_value, i);
      }
    }
    if (!three && !eight) run_block<1, Vectors, 4>(task, first_value, i);
  }
}

/// One block of values × one of inputs.
template <class Task>
void run_unit(const Task& task, int64_t unit) {
  const ConvLayout& layout = *task.p.layout;
  const int64_t first = unit % layout.input_blocks() * kUnitInputs;
  const int64_t last = first + kUnitInputs < layout.inputs ? first + kUnitInputs : layout.inputs;
  const int64_t begin = unit / layout.input_blocks() * kUnitValues;
  const int64_t end = begin + kUnitValues < layout.values ? begin + kUnitValues : layout.values;
  for (int64_t value = begin; value < end; value += 2 * kLanes) {
    end - value > kLanes ? run_inputs<2>(task, value, first, last) : run_inputs<1>(task, value, first, last);
  }
}

}  // namespace

void conv_square(const ConvSquareProblem& p, int64_t first_unit, int64_t last_unit) {
  const Buffer<V> memory(SquareExamples::vectors(p));
  const int64_t planes = p.shape->kernel[0];
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    if (p.layout->pairs) {
      run_unit(SquareExamples{p, {0, planes}, memory.get()}, unit);
    } else {
      run_unit(SquareExamples{p, {unit % planes, 1}, memory.get()}, unit / planes);
    }
  }
}

void conv_square_add(const ConvSquareProblem& p, int64_t first_unit, int64_t last_unit) {
  const int64_t planes = p.layout->plane_taps;
  for (int64_t unit = first_unit; unit < last_unit; ++unit) run_unit(AddSlab{p, unit % planes}, unit / planes);
}

void conv_square_sums(const ConvSquareProblem& p, int64_t first_unit, int64_t last_unit) {
  const Buffer<V> memory(SquareSums::vectors(p));
  for (int64_t unit = first_unit; unit < last_unit; ++unit) run_unit(SquareSums{p, memory.get()}, unit);
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
