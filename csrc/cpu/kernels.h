// SPDX-License-Identifier: Apache-2.0
//
// The CPU kernels as seen by the operators. Their files (kernel_sources of CMakeLists.txt) are compiled once per
// instruction set, into a namespace of that name; kernels() gives the table of the set chosen when the library is
// loaded. Every set gives the same bits, except in the convolutions. A kernel works on a range of blocks, so that the
// caller may hand blocks to threads in any way.
#pragma once

#include <cstdint>

#include "../cuda/merge.h"
#include "../cuda/sample_labels.h"
#include "../cuda/square_accumulate.h"
#include "conv_square.h"
#include "doubling.h"
#include "instance_norm.h"
#include "small_conv.h"
#include "small_square.h"
#include "strided_conv.h"
#include "winograd.h"

namespace timm_ext::cpu {

using cuda::Element;
using cuda::MergeGradient;
using cuda::MergeInputs;
using cuda::MergePlaneGradients;
using cuda::SampleProblem;
using cuda::SquareAccumulateItem;

/// Elements of a block: θ and F of five models in float32 fit in a megabyte.
constexpr int64_t kBlock = 16384;

inline int64_t block_count(int64_t elements) { return (elements + kBlock - 1) / kBlock; }

/// How logits become weights: σ(δ), exp(δ) or δ itself.
enum class Mixing { kSigmoid, kSoftmax, kRatios };

// `streamed`: the result is too large for the caches and goes past them.
// backward_log_weight writes the rows of segments inside one block; the sums of cut segments go to `edges`
// [blocks, 2, T], first the segment that enters the block, then the one that leaves it.
// square_accumulate: acc[i] += scale Σ g[i]² over `each` gradients for i in [begin, end).
// conv_square: whole examples; conv_square_add: a slab of one, then conv_square_sums: its squares.
// instance_norm and its backward: a plane is one channel of one example.
// double_planes: planes of the input, of all channels.
// neighbour_sums: planes of the output, of all channels.
// winograd_weights: blocks of channels of the output; then winograd_conv: units as winograd.h says.
// small_square_rows: channels of the input; then small_square: blocks of channels of the output.
// strided_weights: blocks of channels of the output; then strided_gather or strided_spread: units as strided_conv.h
// says.
// small_conv_columns: of some channels of the input; then small_conv: blocks of channels of the output.
// sample_labels: a unit is a block of one example's voxels, example after example.
// log_weights and its backward: rows of `models` logits, of Element kFloat32 or kFloat64.
#define TIMM_EXT_KERNELS                                                                                         \
  void merge_forward(const MergeInputs&, void* merged, bool streamed, int64_t first_block, int64_t last_block);  \
  void merge_backward_log_weight(const MergeInputs&, const MergeGradient&, void* grad_log_weight, double* edges, \
                                 int64_t first_block, int64_t last_block);                                       \
  void merge_backward_planes(const MergeInputs&, const MergeGradient&, const MergePlaneGradients&,               \
                             int64_t first_block, int64_t last_block);                                           \
  void square_accumulate(const SquareAccumulateItem&, int64_t each, Element, double scale, int64_t begin,        \
                         int64_t end);                                                                           \
  void conv_square(const ConvSquareProblem&, int64_t first_unit, int64_t last_unit);                             \
  void conv_square_add(const ConvSquareProblem&, int64_t first_unit, int64_t last_unit);                         \
  void conv_square_sums(const ConvSquareProblem&, int64_t first_unit, int64_t last_unit);                        \
  void conv_grad_forms(const float* const* rows, int64_t row, float* to, int64_t form);                          \
  void conv_input_forms(const float* const* rows, int64_t row, float* to, int64_t form);                         \
  void double_planes(const DoublingProblem&, int64_t first_plane, int64_t last_plane);                           \
  void neighbour_sums(const NeighbourSumsProblem&, int64_t first_plane, int64_t last_plane);                     \
  void winograd_weights(const WinogradWeights&, int64_t first_block, int64_t last_block);                        \
  void winograd_conv(const WinogradProblem&, int64_t first_unit, int64_t last_unit);                             \
  void instance_norm(const InstanceNormProblem&, int64_t first_plane, int64_t last_plane);                       \
  void instance_norm_backward(const InstanceNormGradient&, int64_t first_plane, int64_t last_plane);             \
  void small_conv_columns(const SmallConvProblem&, int64_t first_input, int64_t last_input);                     \
  void small_conv(const SmallConvProblem&, int64_t first_block, int64_t last_block);                             \
  void small_square_rows(const SmallSquareProblem&, int64_t first_channel, int64_t last_channel);                \
  void small_square(const SmallSquareProblem&, int64_t first_block, int64_t last_block);                         \
  void strided_weights(const StridedWeights&, int64_t first_block, int64_t last_block);                          \
  void strided_gather(const StridedConvProblem&, int64_t first_unit, int64_t last_unit);                         \
  void strided_spread(const StridedConvProblem&, int64_t first_unit, int64_t last_unit);                         \
  void sample_labels(const SampleProblem&, int64_t first_unit, int64_t last_unit);                               \
  void log_weights(Mixing, Element, const void* logits, void* out, int64_t models, int64_t first_row,            \
                   int64_t last_row);                                                                            \
  void log_weights_backward(Mixing, Element, const void* grad, const void* logits, void* out, int64_t models,    \
                            int64_t first_row, int64_t last_row);

namespace baseline {
TIMM_EXT_KERNELS
}
#if defined(TIMM_EXT_X86)
namespace avx2 {
TIMM_EXT_KERNELS
}
namespace avx512 {
TIMM_EXT_KERNELS
}
#endif

struct Kernels {
  decltype(&baseline::merge_forward) merge_forward;
  decltype(&baseline::merge_backward_log_weight) merge_backward_log_weight;
  decltype(&baseline::merge_backward_planes) merge_backward_planes;
  decltype(&baseline::square_accumulate) square_accumulate;
  decltype(&baseline::conv_square) conv_square;
  decltype(&baseline::conv_square_add) conv_square_add;
  decltype(&baseline::conv_square_sums) conv_square_sums;
  decltype(&baseline::conv_grad_forms) conv_grad_forms;
  decltype(&baseline::conv_input_forms) conv_input_forms;
  decltype(&baseline::double_planes) double_planes;
  decltype(&baseline::neighbour_sums) neighbour_sums;
  decltype(&baseline::winograd_weights) winograd_weights;
  decltype(&baseline::winograd_conv) winograd_conv;
  decltype(&baseline::instance_norm) instance_norm;
  decltype(&baseline::instance_norm_backward) instance_norm_backward;
  decltype(&baseline::small_conv_columns) small_conv_columns;
  decltype(&baseline::small_conv) small_conv;
  decltype(&baseline::small_square_rows) small_square_rows;
  decltype(&baseline::small_square) small_square;
  decltype(&baseline::strided_weights) strided_weights;
  decltype(&baseline::strided_gather) strided_gather;
  decltype(&baseline::strided_spread) strided_spread;
  decltype(&baseline::sample_labels) sample_labels;
  decltype(&baseline::log_weights) log_weights;
  decltype(&baseline::log_weights_backward) log_weights_backward;
};

/// Adds up the edges of cut segments, block by block, and writes their rows.
void stitch_edges(const MergeInputs& inputs, const double* edges, void* grad_log_weight);

/// The kernels of the chosen instruction set; throws std::runtime_error where TIMM_EXT_ISA names one that is not there.
const Kernels& kernels();

}  // namespace timm_ext::cpu
