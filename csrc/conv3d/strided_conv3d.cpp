// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "conv3d/arguments.h"
#include "conv3d/cpu/kernels.h"
#include "operators.h"

namespace timm_ext {
namespace {

using cpu::StridedConvProblem;
using torch::stable::parallel_for;

constexpr int64_t kUnitsPerThread = 2;

/// Which channels of the weight [O, I, 3, 3, 3] those of the result are, and in which order its taps are met.
struct Way {
  const char* op;
  bool outputs_first;
  bool mirrored;
  bool upsampled;
  bool scatter;
};

void check_arguments(const Way& way, const char* name, const Tensor& from, const Tensor& weight) {
  check_volume(way.op, name, from, 5, from);
  check_volume(way.op, "weight", weight, 5, from);
  const int64_t inputs = weight.size(way.outputs_first ? 1 : 0);
  TIMM_EXT_CHECK(weight.size(2) == 3 && weight.size(3) == 3 && weight.size(4) == 3 && inputs == from.size(1), way.op,
                 ": weight must be ", way.outputs_first ? "[O, " : "[", from.size(1), way.outputs_first ? "" : ", I",
                 ", 3, 3, 3] for ", name, " ", list(from.sizes()), " (got ", list(weight.sizes()), ")");
}

/// Sizes of the result.
std::vector<int64_t> sizes_of(const Tensor& from, const Way& way, const Tensor& weight, const int64_t (&result)[3]) {
  return {from.size(0), weight.size(way.outputs_first ? 0 : 1), result[0], result[1], result[2]};
}

Tensor prepare(const Way& way, const Tensor& weight) {
  const Tensor g = torch::stable::contiguous(weight);
  const int64_t outputs = g.size(way.outputs_first ? 0 : 1), inputs = g.size(way.outputs_first ? 1 : 0);
  const int64_t blocks = cpu::strided_blocks(outputs), taps = cpu::kStridedTaps;
  const Tensor prepared = new_tensor(g, {blocks * cpu::strided_block_elements(inputs)});
  const cpu::StridedWeights weights{values_of(g),
                                    outputs,
                                    inputs,
                                    way.outputs_first ? inputs * taps : taps,
                                    way.outputs_first ? taps : outputs * taps,
                                    way.mirrored,
                                    way.scatter,
                                    room_of(prepared)};
  parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) { cpu::strided_weights(weights, first, last); });
  return prepared;
}

/// Planes of a chunk: all, unless threads would go without work.
int64_t chunk_of(const StridedConvProblem& p) {
  const int64_t threads = torch::stable::get_num_threads(), wanted = threads > 1 ? kUnitsPerThread * threads : 1;
  const int64_t units = p.examples * cpu::strided_blocks(p.outputs);
  const int64_t chunks = std::clamp<int64_t>((wanted + units - 1) / units, 1, std::max<int64_t>(p.small[0] / 2, 1));
  return (p.small[0] + chunks - 1) / chunks;
}

Tensor run(const Way& way, const Tensor& from, const Tensor& weight, const std::optional<Tensor>& bias,
           const int64_t (&small)[3], const int64_t (&large)[3]) {
  const Tensor result = new_tensor(from, sizes_of(from, way, weight, way.scatter ? large : small));
  if (result.numel() == 0) return result;
  if (from.size(1) == 0) {
    write_bias(result, bias);
    return result;
  }
  const Tensor x = torch::stable::contiguous(from), prepared = prepare(way, weight);
  StridedConvProblem problem{x.size(0),
                             result.size(1),
                             x.size(1),
                             {small[0], small[1], small[2]},
                             {large[0], large[1], large[2]},
                             way.upsampled,
                             values_of(x),
                             values_of(prepared),
                             values_of(bias),
                             room_of(result),
                             0};
  problem.chunk = chunk_of(problem);
  const auto kernel = way.scatter ? cpu::strided_scatter.chosen() : cpu::strided_gather.chosen();
  const int64_t units = way.scatter ? scatter_units(problem) : gather_units(problem);
  parallel_for(0, units, 1, [&](int64_t first, int64_t last) { kernel(problem, first, last); });
  return result;
}

}  // namespace

Tensor strided_conv3d_input_gradient(const Tensor& grad, const Tensor& weight, std::vector<int64_t> size) {
  const Way way{"strided_conv3d_input_gradient", false, false, false, true};
  check_arguments(way, "grad", grad, weight);
  check_numbers(way.op, "size", size, 3, 1);
  const int64_t large[3] = {size[0], size[1], size[2]};
  const int64_t small[3] = {(size[0] + 1) / 2, (size[1] + 1) / 2, (size[2] + 1) / 2};
  TIMM_EXT_CHECK(grad.size(2) == small[0] && grad.size(3) == small[1] && grad.size(4) == small[2], way.op,
                 ": grad must have half of size, rounded up, ", list({small[0], small[1], small[2]}), " (got ",
                 list(grad.sizes()), ")");
  return run(way, grad, weight, std::nullopt, small, large);
}

Tensor upsampled_conv3d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Way way{"upsampled_conv3d", true, true, true, true};
  check_arguments(way, "input", input, weight);
  check_bias(way.op, bias, weight.size(0), input);
  const int64_t small[3] = {input.size(2), input.size(3), input.size(4)};
  const int64_t large[3] = {2 * small[0], 2 * small[1], 2 * small[2]};
  return run(way, input, weight, bias, small, large);
}

Tensor upsampled_conv3d_input_gradient(const Tensor& sums, const Tensor& weight) {
  const Way way{"upsampled_conv3d_input_gradient", false, true, false, false};
  check_arguments(way, "sums", sums, weight);
  const int64_t large[3] = {sums.size(2), sums.size(3), sums.size(4)};
  check_sums(way.op, sums);
  const int64_t small[3] = {large[0] / 2, large[1] / 2, large[2] / 2};
  return run(way, sums, weight, std::nullopt, small, large);
}

}  // namespace timm_ext
