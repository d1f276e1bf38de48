// SPDX-License-Identifier: Apache-2.0
#include "conv3d/conv_square_on_cpu.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "conv3d/arguments.h"
#include "conv3d/conv_square_group.h"
#include "conv3d/cpu/kernels.h"
#include "conv3d/depthwise.h"
#include "conv3d/packed_square.h"
#include "conv3d/pointwise_square.h"
#include "conv3d/winograd_square.h"
#include "operators.h"

namespace timm_ext {
namespace {

using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kFewPoints = 32;                        // in all, up to which no packing pays
constexpr int64_t kNeighbourElements = int64_t{1} << 18;  // that stay in the second-level cache
constexpr int64_t kChannelsPerThread = 8;

/// grad as [examples, points, outputs padded].
Tensor transpose_grad(const cpu::SmallSquareProblem& p, const Tensor& like, const ConvGroup<float>& group) {
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
void square_few_points(const ConvShape& shape, const Tensor& acc, const ConvGroup<float>& group, int64_t examples,
                       float scale, bool squared) {
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

/// Of groups with one input and one output each.
void square_depthwise(const ConvShape& shape, const Tensor& acc, const Tensor& grad, const Tensor& input, float scale,
                      bool squared) {
  const cpu::DepthwiseTiling tiling(shape, false);
  ConvShape bare{1, 1, {}, {}, {1, 1, 1}, {1, 1, 1}, {}, {1, 1, 1}};
  for (int a = 0; a < 3; ++a) bare.in[a] = bare.out[a] = shape.out[a];
  const cpu::DepthwiseTiling grad_tiling(bare, false, tiling.layout().chunk);
  const cpu::DepthwiseSquareProblem problem{&tiling.layout(), &grad_tiling.layout(), values_of(grad), values_of(input),
                                            room_of(acc),     grad.size(0),          grad.size(1),    scale,
                                            squared};
  parallel_for(0, problem.channels, 1,
               [&](int64_t first, int64_t last) { cpu::depthwise_square(problem, first, last); });
}

template <class S>
ConvGroup<S> whole(const Tensor& acc, const Tensor& grad, const Tensor& input) {
  const int64_t examples = grad.size(0);
  return {static_cast<const S*>(grad.const_data_ptr()),
          static_cast<const S*>(input.const_data_ptr()),
          grad.numel() / examples,
          input.numel() / examples,
          room_of(acc),
          acc.numel()};
}

}  // namespace

void square_on_cpu(const ConvShape& shape, const Tensor& acc, const Tensor& grad, const Tensor& input, int64_t groups,
                   float scale, bool exchanged, bool squared) {
  const int64_t examples = grad.size(0);
  if (is_half(grad)) {
    const auto group = whole<math::BFloat16>(acc, grad, input);
    square_packed(shape, acc, group, groups, examples, scale, exchanged, squared);
    return;
  }
  const auto group = whole<float>(acc, grad, input);
  if (!exchanged && depthwise_fits(shape, groups)) {
    square_depthwise(shape, acc, grad, input, scale, squared);
  } else if (!exchanged && pointwise_fits(shape, groups)) {
    square_pointwise(acc, grad, input, scale, squared);
  } else if (!exchanged && examples * shape.out[0] * shape.out[1] * shape.out[2] <= kFewPoints) {
    for (int64_t n = 0; n < groups; ++n) square_few_points(shape, acc, group.at(n, groups), examples, scale, squared);
  } else if (!exchanged && cpu::serves_winograd_square(shape)) {
    for (int64_t n = 0; n < groups; ++n) square_winograd(shape, acc, group.at(n, groups), examples, scale, squared);
  } else {
    square_packed(shape, acc, group, groups, examples, scale, exchanged, squared);
  }
}

}  // namespace timm_ext
