// SPDX-License-Identifier: Apache-2.0
#include "conv3d/pointwise_square.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "checks.h"
#include "conv3d/cpu/pointwise_square.h"
#include "operators.h"

namespace timm_ext {
namespace {

using torch::stable::Tensor;

constexpr int64_t kMostWeights = 4096;
constexpr int64_t kLeastPoints = 2048;
constexpr int64_t kChunkElements = int64_t{1} << 16;  // of grad and input, which stay in the second-level cache
constexpr int64_t kLeastChunk = 512;                  // points

}  // namespace

bool pointwise_fits(const ConvShape& s, int64_t groups) {
  bool fits = groups == 1 && s.outputs * s.inputs <= kMostWeights;
  for (int a = 0; a < 3; ++a) fits = fits && s.kernel[a] == 1 && s.stride[a] == 1 && s.padding[a] == 0;
  return fits && s.out[0] * s.out[1] * s.out[2] >= kLeastPoints && s.out[0] == s.in[0] && s.out[1] == s.in[1] &&
         s.out[2] == s.in[2];
}

void square_pointwise(const Tensor& acc, const Tensor& grad, const Tensor& input, float scale, bool squared) {
  const int64_t examples = grad.size(0), outputs = grad.size(1), inputs = input.size(1);
  const int64_t points = grad.numel() / examples / outputs;
  const int64_t chunk = std::max(kChunkElements / (outputs + inputs) / 64 * 64, kLeastChunk);
  cpu::PointwiseProblem problem{values_of(grad), values_of(input), outputs, inputs, points, chunk, nullptr};
  const int64_t chunks = problem.chunks(), weights = outputs * inputs;
  const Tensor sums = new_tensor(acc, {examples * chunks * weights});
  problem.sums = room_of(sums);
  torch::stable::parallel_for(0, examples * chunks, 1,
                              [&](int64_t first, int64_t last) { cpu::pointwise_products(problem, first, last); });
  float* const to = room_of(acc);
  for (int64_t weight = 0; weight < weights; ++weight) {
    double all = 0;
    for (int64_t b = 0; b < examples; ++b) {
      double one = 0;
      for (int64_t c = 0; c < chunks; ++c) one += problem.sums[(b * chunks + c) * weights + weight];
      all += squared ? one * one : one;
    }
    to[weight] += static_cast<float>(scale * all);
  }
}

}  // namespace timm_ext
