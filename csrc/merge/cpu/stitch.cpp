// SPDX-License-Identifier: Apache-2.0
#include <vector>

#include "math/tiles.h"
#include "merge/cpu/kernels.h"

namespace timm_ext::cpu {
namespace {

template <class L>
void stitch(const MergeInputs& in, const double* edges, L* grad_log_weight) {
  const int64_t models = in.models;
  std::vector<double> sums(models);
  for (int64_t first = 0; first + 1 < block_count(in.elements);) {
    const int64_t boundary = (first + 1) * kBlock;
    const int64_t segment = math::find_segment(in.offsets, in.segments, boundary);
    if (in.offsets[segment] == boundary) {
      ++first;
      continue;
    }
    const int64_t last = (in.offsets[segment + 1] - 1) / kBlock;
    sums.assign(models, 0.0);
    for (int64_t block = first; block <= last; ++block) {
      const double* edge = edges + (block * 2 + (in.offsets[segment] > block * kBlock)) * models;
      for (int64_t t = 0; t < models; ++t) sums[t] += edge[t];
    }
    for (int64_t t = 0; t < models; ++t) grad_log_weight[segment * models + t] = static_cast<L>(sums[t]);
    first = last;
  }
}

}  // namespace

void stitch_edges(const MergeInputs& inputs, const double* edges, void* grad_log_weight) {
  if (inputs.element == Element::kFloat64) {
    stitch(inputs, edges, static_cast<double*>(grad_log_weight));
  } else {
    stitch(inputs, edges, static_cast<float*>(grad_log_weight));
  }
}

}  // namespace timm_ext::cpu
