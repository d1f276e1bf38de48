// SPDX-License-Identifier: Apache-2.0
#include "conv3d/winograd_square.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "checks.h"
#include "conv3d/cpu/kernels.h"
#include "operators.h"

namespace timm_ext {
namespace {

using cpu::WinogradSquareProblem;
using torch::stable::parallel_for;
using torch::stable::Tensor;

/// The lines [first, last), slab after slab; for_units(kernel, problem, units) calls a kernel for all its units.
template <class ForUnits>
void add_lines(WinogradSquareProblem problem, int64_t first, int64_t last, const ForUnits& for_units) {
  problem.first_slab = true;
  for (; first < last; first = problem.last_line, problem.first_slab = false) {
    problem.first_line = first;
    problem.last_line = std::min(first + problem.layout->slab, last);
    for_units(cpu::winograd_square_pack, problem, problem.pack_units());
    for_units(cpu::winograd_square_add, problem, problem.add_units());
  }
}

const auto by_all_threads = [](const auto& kernel, const WinogradSquareProblem& problem, int64_t units) {
  parallel_for(0, units, 1, [&](int64_t first, int64_t last) { kernel(problem, first, last); });
};

const auto by_this_thread = [](const auto& kernel, const WinogradSquareProblem& problem, int64_t units) {
  kernel(problem, 0, units);
};

/// Lines from `first` on that go together: each part of them by one thread, or a single part by all threads.
void add_parts(const WinogradSquareProblem& problem, int64_t first, int64_t workers) {
  const cpu::WinogradSquareLayout& layout = *problem.layout;
  if (layout.parts == 1) {
    add_lines(problem, first, first + layout.together, by_all_threads);
    return;
  }
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    WinogradSquareProblem own = problem;
    own.packed_grad += begin * layout.packed_elements();
    own.packed_input += begin * layout.packed_elements();
    for (int64_t part = begin * layout.parts / workers; part < end * layout.parts / workers; ++part) {
      own.sums = problem.sums + part * layout.part_sums();
      add_lines(own, first + layout.part_line(part), first + layout.part_line(part + 1), by_this_thread);
    }
  });
}

}  // namespace

void square_winograd(const ConvShape& shape, const Tensor& acc, const ConvGroup<float>& group, int64_t examples,
                     float scale, bool squared) {
  const cpu::WinogradSquareLayout layout(shape, squared ? 1 : examples);
  const int64_t workers = std::min<int64_t>(layout.parts, torch::stable::get_num_threads());
  const Tensor packed = new_tensor(acc, {workers * layout.packed_elements()});
  const Tensor sums = new_tensor(acc, {layout.parts * layout.part_sums()});
  const WinogradSquareProblem problem{&shape,
                                      &layout,
                                      group.grad,
                                      group.input,
                                      group.grad_example,
                                      group.input_example,
                                      room_of(packed),
                                      room_of(packed) + layout.grad_blocks * layout.block(),
                                      room_of(sums),
                                      group.accumulator,
                                      scale,
                                      squared,
                                      0,
                                      0,
                                      true};
  for (int64_t first = 0; first < examples * layout.lines(); first += layout.together) {
    add_parts(problem, first, workers);
    by_all_threads(cpu::winograd_square_write, problem, problem.write_units());
  }
}

}  // namespace timm_ext
