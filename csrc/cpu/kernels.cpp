// SPDX-License-Identifier: Apache-2.0
#include "kernels.h"

#include <vector>

#include "../math/tiles.h"
#include "isa.h"

namespace timm_ext::cpu {
namespace {

#define TIMM_EXT_TABLE(isa)        \
  {isa::merge_forward,             \
   isa::merge_backward_log_weight, \
   isa::merge_backward_planes,     \
   isa::square_accumulate,         \
   isa::conv_square,               \
   isa::conv_square_add,           \
   isa::conv_square_sums,          \
   isa::conv_grad_forms,           \
   isa::conv_input_forms,          \
   isa::double_planes,             \
   isa::neighbour_sums,            \
   isa::winograd_weights,          \
   isa::winograd_conv,             \
   isa::instance_norm,             \
   isa::instance_norm_backward,    \
   isa::small_conv_columns,        \
   isa::small_conv,                \
   isa::small_square_rows,         \
   isa::small_square,              \
   isa::strided_weights,           \
   isa::strided_gather,            \
   isa::strided_spread,            \
   isa::sample_labels,             \
   isa::log_weights,               \
   isa::log_weights_backward}

Kernels choose() {
#if defined(TIMM_EXT_X86)
  const std::string isa = chosen_isa();
  if (isa == "avx512") return TIMM_EXT_TABLE(avx512);
  if (isa == "avx2") return TIMM_EXT_TABLE(avx2);
#else
  chosen_isa();
#endif
  return TIMM_EXT_TABLE(baseline);
}

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

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace timm_ext::cpu
