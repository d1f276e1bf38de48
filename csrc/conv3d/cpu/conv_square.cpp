// SPDX-License-Identifier: Apache-2.0
//
// The lanes of vectors are outputs (and halves), a value of the input is broadcast to them; a block of outputs × inputs
// is summed in registers, over rows of points that stay in a cache. Compiled with fused
// multiply-add where there is one: the bits hang on the instruction set, but not on the number of threads.
#include <cstring>

#include "conv3d/cpu/conv_square_block.h"
#include "conv3d/cpu/kernels.h"
#include "cpu/buffer.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int64_t kRows = 1 << 12;      // elements of grad and input of a unit: they stay in the first-level cache
constexpr int64_t kTogether = 1 << 16;  // elements of the sums of units that go through the rows together

/// Sums and totals of a unit, [taps, vectors of values, inputs]: those of one example, and those of all.
struct UnitSums {
  static constexpr int64_t kTap = kUnitValues / kLanes * kUnitInputs;

  explicit UnitSums(const ConvSquareProblem& p)
      : planes(p.layout->pairs ? p.shape->kernel[0] : 1),
        sum_taps((p.layout->pairs ? p.layout->plane_taps : 1) * p.layout->row_taps * p.shape->kernel[2]),
        total_taps(planes * p.shape->kernel[1] * p.shape->kernel[2]) {}

  int64_t vectors() const { return (sum_taps + total_taps) * kTap; }

  /// Where those of a block begin.
  template <class B>
  static int64_t before(int64_t first_value, int64_t first_input) {
    return first_value % kUnitValues / kLanes * kUnitInputs + first_input % kUnitInputs * B::kVectors;
  }

  int64_t planes;  // of the kernel
  int64_t sum_taps;
  int64_t total_taps;
};

/// A unit's part in the sums of whole examples: blocks × the planes of the kernel from `plane` on.
struct SquareUnit {
  const ConvSquareProblem& p;
  const UnitSums& shape;
  int64_t plane;
  V* memory;

  template <class B>
  V* sums(int64_t first_value, int64_t first_input) const {
    return memory + shape.sum_taps * UnitSums::before<B>(first_value, first_input);
  }
  template <class B>
  V* totals(int64_t first_value, int64_t first_input) const {
    return memory + shape.sum_taps * UnitSums::kTap + shape.total_taps * UnitSums::before<B>(first_value, first_input);
  }
};

struct AddRows : SquareUnit {
  int64_t example;
  int64_t first_row;
  int64_t last_row;

  template <class B>
  void run(int64_t first_value, int64_t first_input) const {
    const int64_t first = plane * shape.sum_taps;
    Block<B>(p, first_value, first_input)
        .add_taps(example, first_row, last_row, first, first + shape.sum_taps, sums<B>(first_value, first_input));
  }
};

/// An example, or all of them: squares, or they themselves, are added to the totals.
struct TakeExample : SquareUnit {
  template <class B>
  void run(int64_t first_value, int64_t first_input) const {
    const Block<B> block(p, first_value, first_input);
    V* const from = sums<B>(first_value, first_input);
    if (p.layout->pairs) block.combine(from);
    block.take(from, shape.planes, totals<B>(first_value, first_input));
  }
};

struct WriteTotals : SquareUnit {
  template <class B>
  void run(int64_t first_value, int64_t first_input) const {
    const int64_t step = shape.total_taps / shape.planes * B::kSums;
    const V* const from = totals<B>(first_value, first_input);
    const Block<B> block(p, first_value, first_input);
    for (int64_t d = 0; d < shape.planes; ++d) block.write(from + d * step, plane + d);
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
    Block<B>(p, first_value, first_input).add_taps(0, 0, p.rows, plane * taps, (plane + 1) * taps, sums);
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

/// Some units, all of whose sums stay in a cache while the rows go through it once.
void square_units(const ConvSquareProblem& p, const UnitSums& shape, int64_t first_unit, int64_t last_unit, V* memory) {
  const int64_t kernel_planes = p.layout->pairs ? 1 : p.shape->kernel[0];
  const int64_t row = p.shape->out[2] * (p.layout->grad_point() + p.layout->input_point() * p.shape->stride[2]);
  const int64_t rows = p.layout->pairs ? p.rows : larger_of(kRows / row, 1);
  std::memset(static_cast<void*>(memory), 0, (last_unit - first_unit) * shape.vectors() * sizeof(V));
  const auto each_unit = [&](const auto& run) {
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      const SquareUnit one{p, shape, unit % kernel_planes, memory + (unit - first_unit) * shape.vectors()};
      run_unit(run(one), unit / kernel_planes);
    }
  };
  for (int64_t b = 0; b < p.examples; ++b) {
    for (int64_t first = 0; first < p.rows; first += rows) {
      each_unit([&](const SquareUnit& unit) { return AddRows{unit, b, first, smaller_of(first + rows, p.rows)}; });
    }
    if (p.squared || b + 1 == p.examples) each_unit([](const SquareUnit& unit) { return TakeExample{unit}; });
  }
  each_unit([](const SquareUnit& unit) { return WriteTotals{unit}; });
}

}  // namespace

void conv_square(const ConvSquareProblem& p, int64_t first_unit, int64_t last_unit) {
  const UnitSums shape(p);
  const int64_t together = larger_of(kTogether / kLanes / shape.vectors(), 1);
  const Buffer<V> memory(smaller_of(together, last_unit - first_unit) * shape.vectors());
  for (int64_t unit = first_unit; unit < last_unit; unit += together) {
    square_units(p, shape, unit, smaller_of(unit + together, last_unit), memory.get());
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
