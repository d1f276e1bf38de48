// SPDX-License-Identifier: Apache-2.0
#include "conv3d/conv_square_on_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "conv3d/cpu/kernels.h"
#include "operators.h"

namespace timm_ext {
namespace {

using cpu::ConvLayout;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kPackedElements = int64_t{1} << 23;  // of the examples that are packed at a time
constexpr int64_t kRowsPerThread = 16;
constexpr int64_t kPairsPerThread = 4;
constexpr int64_t kFewPoints = 32;                        // in all, up to which no packing pays
constexpr int64_t kNeighbourElements = int64_t{1} << 18;  // that stay in the second-level cache
constexpr int64_t kChannelsPerThread = 8;

/// Where a group of channels begins, and elements from one example to the next.
struct Group {
  const float* grad;
  const float* input;
  int64_t grad_example;
  int64_t input_example;
  float* accumulator;
  int64_t accumulator_elements;  // of all groups

  Group at(int64_t group, int64_t groups) const {
    return {grad + group * (grad_example / groups),
            input + group * (input_example / groups),
            grad_example,
            input_example,
            accumulator + group * (accumulator_elements / groups),
            accumulator_elements};
  }
};

/// One group of a convolution, its products of grad and input packed.
struct Work {
  const ConvShape& shape;
  const ConvLayout& layout;
  const Group& group;
  int64_t output_step;  // of the accumulator
  int64_t input_step;
  float scale;
  float* packed;  // of as many examples as go together
  float* sums;    // over slabs
  bool squared;

  /// The examples [first, last), packed and squared.
  void run(int64_t first, int64_t last) const {
    const cpu::ConvSquareProblem problem = problem_of(last - first, layout.grad_rows());
    for (int64_t b = 0; b < last - first; ++b) pack(first + b, problem, b, 0);
    for_units(cpu::conv_square, problem, conv_square_units(problem));
  }

  /// One of the examples, that takes several slabs; not squared, the last one brings the sum of all.
  void run_slabs(int64_t example, int64_t examples) const {
    if (squared || example == 0) std::fill_n(sums, conv_sums_elements(layout, shape), 0.0f);
    for (int64_t slab = 0; slab < layout.grad_rows(); slab += layout.slab) {
      const int64_t last = std::min(slab + layout.slab, layout.grad_rows());
      const cpu::ConvSquareProblem problem = problem_of(1, last - slab);
      pack(example, problem, 0, slab);
      for_units(cpu::conv_square_add, problem, conv_square_add_units(problem));
    }
    if (!squared && example + 1 < examples) return;
    const cpu::ConvSquareProblem problem = problem_of(1, 0);
    for_units(cpu::conv_square_sums, problem, conv_square_units(problem));
  }

 private:
  cpu::ConvSquareProblem problem_of(int64_t examples, int64_t rows) const {
    const float* const input_packed = packed + examples * layout.grad_elements(shape);
    return {&shape, &layout,           layout.taps.data(), packed,     input_packed, examples, rows,
            sums,   group.accumulator, output_step,        input_step, scale,        squared};
  }

  /// Packs the rows of an example from `slab` on.
  void pack(int64_t example, const cpu::ConvSquareProblem& problem, int64_t place, int64_t slab) const {
    const int64_t grain = layout.pairs ? kPairsPerThread : kRowsPerThread;
    const int64_t input_rows = layout.pairs ? problem.rows : layout.input_rows();
    const float* const g = group.grad + example * group.grad_example;
    const float* const x = group.input + example * group.input_example;
    float* const to_grad = packed + place * layout.grad_elements(shape);
    float* const to_input = packed + problem.examples * layout.grad_elements(shape) + place * layout.input_elements();
    parallel_for(slab, slab + problem.rows, grain, [&](int64_t begin, int64_t end) {
      pack_grad(shape, layout, cpu::conv_grad_forms.chosen(), g, to_grad, slab, begin, end);
    });
    parallel_for(slab, slab + input_rows, grain, [&](int64_t begin, int64_t end) {
      pack_input(shape, layout, cpu::conv_input_forms.chosen(), x, to_input, slab, begin, end);
    });
  }

  template <class Kernel>
  static void for_units(Kernel kernel, const cpu::ConvSquareProblem& problem, int64_t units) {
    parallel_for(0, units, 1, [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
  }
};

void square_packed(const ConvShape& shape, const Tensor& acc, const Group& first_group, int64_t groups,
                   int64_t examples, float scale, bool exchanged, bool squared) {
  const ConvLayout layout(shape, torch::stable::get_num_threads(), exchanged);
  const bool slabs = layout.group < layout.grad_rows();
  const int64_t each = layout.grad_elements(shape) + layout.input_elements();
  const int64_t at_a_time = slabs ? 1 : std::clamp<int64_t>(kPackedElements / each, 1, examples);
  const Tensor packed = new_tensor(acc, {at_a_time * each});
  const Tensor sums = new_tensor(acc, {slabs ? conv_sums_elements(layout, shape) : 0});
  const int64_t taps = shape.kernel[0] * shape.kernel[1] * shape.kernel[2];
  for (int64_t n = 0; n < groups; ++n) {
    const Group group = first_group.at(n, groups);
    const Work work{shape,
                    layout,
                    group,
                    exchanged ? taps : shape.inputs * taps,
                    exchanged ? shape.outputs * taps : taps,
                    scale,
                    room_of(packed),
                    room_of(sums),
                    squared};
    for (int64_t first = 0; first < examples; first += at_a_time) {
      slabs ? work.run_slabs(first, examples) : work.run(first, std::min(examples, first + at_a_time));
    }
  }
}

/// grad as [examples, points, outputs padded].
Tensor transpose_grad(const cpu::SmallSquareProblem& p, const Tensor& like, const Group& group) {
  const int64_t points = p.points(), outputs = p.padded_outputs();
  const Tensor result = new_tensor(like, {p.examples * points * outputs});
  auto* const to = room_of(result);
  std::fill_n(to, p.examples * points * outputs, 0.0f);
  for (int64_t b = 0; b < p.examples; ++b) {
    const float* from = group.grad + b * group.grad_example;
    for (int64_t o = 0; o < p.shape->outputs; ++o) {
      for (int64_t point = 0; point < points; ++point) to[(b * points + point) * outputs + o] = *from++;
    }
  }
  return result;
}

/// Of few points: in the accumulator's order, some channels of the input at a time.
void square_few_points(const ConvShape& shape, const Tensor& acc, const Group& group, int64_t examples, float scale,
                       bool squared) {
  cpu::SmallSquareProblem problem{
      &shape, nullptr, group.input, group.input_example, examples, 0, 0, nullptr, group.accumulator, scale, squared};
  const Tensor grad = transpose_grad(problem, acc, group);
  problem.grad = values_of(grad);
  const int64_t column = examples * problem.points() * problem.taps();  // of a channel
  const int64_t each = std::clamp<int64_t>(kNeighbourElements / column, 1, shape.inputs);
  problem.channels = each;
  const Tensor rows = new_tensor(acc, {examples * problem.points() * problem.width()});
  problem.rows = room_of(rows);
  for (; problem.first < shape.inputs; problem.first += each) {
    problem.channels = std::min(each, shape.inputs - problem.first);
    parallel_for(0, problem.channels, kChannelsPerThread,
                 [&](int64_t first, int64_t last) { cpu::small_square_rows(problem, first, last); });
    parallel_for(0, problem.blocks(), 1, [&](int64_t first, int64_t last) { cpu::small_square(problem, first, last); });
  }
}

}  // namespace

void square_on_cpu(const ConvShape& shape, const Tensor& acc, const Tensor& grad, const Tensor& input, int64_t groups,
                   float scale, bool exchanged, bool squared) {
  const int64_t examples = grad.size(0);
  const Group group{values_of(grad),          values_of(input), grad.numel() / examples,
                    input.numel() / examples, room_of(acc),     acc.numel()};
  if (!exchanged && examples * shape.out[0] * shape.out[1] * shape.out[2] <= kFewPoints) {
    for (int64_t n = 0; n < groups; ++n) square_few_points(shape, acc, group.at(n, groups), examples, scale, squared);
  } else {
    square_packed(shape, acc, group, groups, examples, scale, exchanged, squared);
  }
}

}  // namespace timm_ext
