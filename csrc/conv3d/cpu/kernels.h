// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "conv3d/cpu/conv_square.h"
#include "conv3d/cpu/depthwise.h"
#include "conv3d/cpu/small_conv.h"
#include "conv3d/cpu/small_square.h"
#include "conv3d/cpu/strided_conv.h"
#include "conv3d/cpu/upsampling.h"
#include "conv3d/cpu/winograd.h"
#include "conv3d/cpu/winograd_square.h"
#include "cpu/kernel.h"

namespace timm_ext::cpu {

/// Whole examples; or conv_square_add of a slab of one, then conv_square_sums: its squares.
TIMM_EXT_KERNEL(conv_square, const ConvSquareProblem&, int64_t first_unit, int64_t last_unit);
TIMM_EXT_KERNEL(conv_square_add, const ConvSquareProblem&, int64_t first_unit, int64_t last_unit);
TIMM_EXT_KERNEL(conv_square_sums, const ConvSquareProblem&, int64_t first_unit, int64_t last_unit);
TIMM_EXT_KERNEL(conv_grad_forms, const float* const* rows, int64_t row, float* to, int64_t form);
TIMM_EXT_KERNEL(conv_input_forms, const float* const* rows, int64_t row, float* to, int64_t form);

/// Units as winograd_square.h says: the forms of a slab, their products, and after all slabs the weights.
TIMM_EXT_KERNEL(winograd_square_pack, const WinogradSquareProblem&, int64_t first_unit, int64_t last_unit);
TIMM_EXT_KERNEL(winograd_square_add, const WinogradSquareProblem&, int64_t first_unit, int64_t last_unit);
TIMM_EXT_KERNEL(winograd_square_write, const WinogradSquareProblem&, int64_t first_unit, int64_t last_unit);

/// Of channels of the input; then blocks of channels of the output.
TIMM_EXT_KERNEL(small_square_rows, const SmallSquareProblem&, int64_t first_channel, int64_t last_channel);
TIMM_EXT_KERNEL(small_square, const SmallSquareProblem&, int64_t first_block, int64_t last_block);

/// Of some channels of the input; then blocks of channels of the output.
TIMM_EXT_KERNEL(small_conv_columns, const SmallConvProblem&, int64_t first_input, int64_t last_input);
TIMM_EXT_KERNEL(small_conv, const SmallConvProblem&, int64_t first_block, int64_t last_block);

/// Blocks of channels of the output; then units as winograd.h says.
TIMM_EXT_KERNEL(winograd_weights, const WinogradWeights&, int64_t first_block, int64_t last_block);
TIMM_EXT_KERNEL(winograd_conv, const WinogradProblem&, int64_t first_unit, int64_t last_unit);

/// Blocks of channels of the output; then units as strided_conv.h says.
TIMM_EXT_KERNEL(strided_weights, const StridedWeights&, int64_t first_block, int64_t last_block);
TIMM_EXT_KERNEL(strided_gather, const StridedConvProblem&, int64_t first_unit, int64_t last_unit);
TIMM_EXT_KERNEL(strided_scatter, const StridedConvProblem&, int64_t first_unit, int64_t last_unit);

/// Units as depthwise.h says; channels.
TIMM_EXT_KERNEL(depthwise_conv, const DepthwiseProblem&, int64_t first_unit, int64_t last_unit);
TIMM_EXT_KERNEL(depthwise_square, const DepthwiseSquareProblem&, int64_t first_channel, int64_t last_channel);

/// Planes of the input, of all channels; planes of the output, of all channels.
TIMM_EXT_KERNEL(upsample_planes, const UpsamplingProblem&, int64_t first_plane, int64_t last_plane);
TIMM_EXT_KERNEL(neighbour_sums, const NeighbourSumsProblem&, int64_t first_plane, int64_t last_plane);

}  // namespace timm_ext::cpu
