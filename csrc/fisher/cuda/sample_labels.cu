// SPDX-License-Identifier: Apache-2.0
//
// A thread draws the four numbers of one block and the four variables that they belong to, 16 places apart.
#include "cuda/launch.h"
#include "fisher/cuda/launchers.h"
#include "math/sample.h"

namespace timm_ext::cuda {
namespace {

constexpr int kThreads = 256;

template <class C>
__device__ __forceinline__ void draw_bernoulli(const SampleProblem& problem, int64_t at, C uniform) {
  const auto draw = math::bernoulli(static_cast<const C*>(problem.logits)[at], uniform);
  static_cast<C*>(problem.scores)[at] = draw.score;
  if (problem.labels != nullptr) problem.labels[at] = static_cast<int64_t>(draw.label);
}

/// The weights are computed twice instead of kept: there may be any number of classes.
template <class C>
__device__ __forceinline__ void draw_categorical(const SampleProblem& problem, int64_t example, int64_t voxel,
                                                 C uniform) {
  const int64_t first = example * problem.classes * problem.voxels + voxel;
  const C* const logits = static_cast<const C*>(problem.logits) + first;
  C* const scores = static_cast<C*>(problem.scores) + first;
  C largest = logits[0], total = 0;
  for (int64_t k = 1; k < problem.classes; ++k) largest = math::larger(largest, logits[k * problem.voxels]);
  for (int64_t k = 0; k < problem.classes; ++k) total += math::exp_of(logits[k * problem.voxels] - largest);
  math::Categorical<C> variable(uniform, total);
  for (int64_t k = 0; k < problem.classes; ++k) {
    const C weight = math::exp_of(logits[k * problem.voxels] - largest);
    scores[k * problem.voxels] = variable.next(weight, k + 1 == problem.classes);
  }
  if (problem.labels != nullptr) {
    problem.labels[example * problem.voxels + voxel] = static_cast<int64_t>(variable.label());
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1) sample_labels_kernel(const SampleProblem problem) {
  const int64_t groups = (problem.voxels + math::kDrawsPerGroup - 1) / math::kDrawsPerGroup;
  const int64_t each = groups * math::kBlocksPerGroup;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < problem.examples * each; i += step) {
    const int64_t example = i / each, block = i % each;
    uint32_t x[math::kDrawsPerBlock];
    math::philox(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                 static_cast<uint64_t>(problem.keys[example]), x);
    const int64_t group = block / math::kBlocksPerGroup, lane = block % math::kBlocksPerGroup;
    TIMM_EXT_UNROLL
    for (int j = 0; j < math::kDrawsPerBlock; ++j) {
      const int64_t voxel = group * math::kDrawsPerGroup + j * math::kBlocksPerGroup + lane;
      if (voxel >= problem.voxels) continue;
      const C uniform = static_cast<C>(math::unit_interval(x[j]));
      if (problem.categorical) {
        draw_categorical(problem, example, voxel, uniform);
      } else {
        draw_bernoulli(problem, example * problem.voxels + voxel, uniform);
      }
    }
  }
}

template <class C>
int launch_kernel(const SampleProblem& problem, void* stream) {
  const int64_t groups = (problem.voxels + math::kDrawsPerGroup - 1) / math::kDrawsPerGroup;
  const unsigned blocks = grid_size(problem.examples * groups * math::kBlocksPerGroup, kThreads);
  return launch(sample_labels_kernel<C>, blocks, kThreads, stream, problem);
}

}  // namespace

int sample_labels(const SampleProblem& problem, void* stream) {
  if (problem.element == Element::kFloat64) return launch_kernel<double>(problem, stream);
  return launch_kernel<float>(problem, stream);
}

}  // namespace timm_ext::cuda
