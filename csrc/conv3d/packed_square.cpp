// SPDX-License-Identifier: Apache-2.0
#include "conv3d/packed_square.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "checks.h"
#include "conv3d/cpu/kernels.h"
#include "math/half.h"
#include "operators.h"

namespace timm_ext {
namespace {

using cpu::ConvLayout;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kPackedElements = int64_t{1} << 23;  // of the examples that are packed at a time
constexpr int64_t kRowsPerThread = 16;
constexpr int64_t kPairsPerThread = 4;

/// One group of a convolution, its products of grad and input packed.
template <class S>
struct Work {
  const ConvShape& shape;
  const ConvLayout& layout;
  const ConvGroup<S>& group;
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
    const S* const g = group.grad + example * group.grad_example;
    const S* const x = group.input + example * group.input_example;
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

}  // namespace

template <class S>
void square_packed(const ConvShape& shape, const Tensor& acc, const ConvGroup<S>& first_group, int64_t groups,
                   int64_t examples, float scale, bool exchanged, bool squared) {
  const ConvLayout layout(shape, torch::stable::get_num_threads(), exchanged);
  const bool slabs = layout.group < layout.grad_rows();
  const int64_t each = layout.grad_elements(shape) + layout.input_elements();
  const int64_t at_a_time = slabs ? 1 : std::clamp<int64_t>(kPackedElements / each, 1, examples);
  const Tensor packed = new_tensor(acc, {at_a_time * each});
  const Tensor sums = new_tensor(acc, {slabs ? conv_sums_elements(layout, shape) : 0});
  const int64_t taps = shape.kernel[0] * shape.kernel[1] * shape.kernel[2];
  for (int64_t n = 0; n < groups; ++n) {
    const ConvGroup<S> group = first_group.at(n, groups);
    const Work<S> work{shape,
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

template void square_packed(const ConvShape&, const Tensor&, const ConvGroup<float>&, int64_t, int64_t, float, bool,
                            bool);
template void square_packed(const ConvShape&, const Tensor&, const ConvGroup<math::BFloat16>&, int64_t, int64_t, float,
                            bool, bool);

}  // namespace timm_ext
