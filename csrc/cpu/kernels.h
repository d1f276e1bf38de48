// SPDX-License-Identifier: Apache-2.0
//
// The CPU kernels as seen by the operators. Each file beside this one is compiled once per instruction set, into a
// namespace of that name; kernels() gives the table of the set chosen when the library is loaded. Every set gives the
// same bits. A kernel works on a range of blocks, so that the caller may hand blocks to threads in any way.
#pragma once

#include <cstdint>

#include "../cuda/merge.h"
#include "../cuda/square_accumulate.h"

namespace timm_ext::cpu {

using cuda::Element;
using cuda::MergeGradient;
using cuda::MergeInputs;
using cuda::MergePlaneGradients;
using cuda::SquareAccumulateItem;

/// Elements of a block: θ and F of five models in float32 fit in a megabyte.
constexpr int64_t kBlock = 16384;

inline int64_t block_count(int64_t elements) { return (elements + kBlock - 1) / kBlock; }

struct MergeKernels {
  void (*forward)(const MergeInputs&, void* merged, int64_t first_block, int64_t last_block);
  /// Writes the rows of segments inside one block; the sums of cut segments go to `edges` [blocks, 2, T].
  void (*backward_log_weight)(const MergeInputs&, const MergeGradient&, void* grad_log_weight, double* edges,
                              int64_t first_block, int64_t last_block);
  void (*backward_planes)(const MergeInputs&, const MergeGradient&, const MergePlaneGradients&, int64_t first_block,
                          int64_t last_block);
};

struct Kernels {
  MergeKernels merge;
  /// acc[i] += scale * g[i]² for i in [begin, end).
  void (*square_accumulate)(const SquareAccumulateItem&, Element, double scale, int64_t begin, int64_t end);
};

namespace baseline {
extern const MergeKernels merge_kernels;
void square_accumulate(const SquareAccumulateItem&, Element, double scale, int64_t begin, int64_t end);
}  // namespace baseline
#if defined(TIMM_EXT_X86)
namespace avx2 {
extern const MergeKernels merge_kernels;
void square_accumulate(const SquareAccumulateItem&, Element, double scale, int64_t begin, int64_t end);
}  // namespace avx2
namespace avx512 {
extern const MergeKernels merge_kernels;
void square_accumulate(const SquareAccumulateItem&, Element, double scale, int64_t begin, int64_t end);
}  // namespace avx512
#endif

/// Adds up the edges of cut segments, block by block, and writes their rows.
void stitch_edges(const MergeInputs& inputs, const double* edges, void* grad_log_weight);

/// The kernels of the chosen instruction set; throws std::runtime_error where TIMM_EXT_ISA names one that is not there.
const Kernels& kernels();

}  // namespace timm_ext::cpu
