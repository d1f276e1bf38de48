// SPDX-License-Identifier: Apache-2.0
//
// Norms of bfloat16 whose channels lie side by side. A volume is one long row in which the channels repeat; it is read
// in rows of `width` elements, a multiple of the channels and of kColumns, so that a column is of one channel, and in
// chunks of such rows, which threads may take in any order.
#pragma once

#include <cstdint>

#include "math/half.h"
#include "norm/cpu/kernels.h"

namespace timm_ext::cpu {

/// How the elements of one example are read.
struct Chunks {
  int64_t channels;
  int64_t elements;  // of an example
  int64_t width;     // of a row
  int64_t size;      // elements of a whole chunk
  int64_t count;     // of an example
};

/// In rows whose columns are of one channel each, and about 32 KiB.
inline Chunks chunks_of(int64_t channels, int64_t points) {
  constexpr int64_t kLeast = 64, kElements = 16384;
  int64_t width = channels;
  while (width % kLeast != 0) width += channels;
  const int64_t size = width * (width < kElements ? kElements / width : 1), elements = channels * points;
  return {channels, elements, width, size, (elements + size - 1) / size};
}

/// `norm` without input, output and slope.
struct ChannelsLastProblem {
  NormProblem norm;
  const math::BFloat16* input;  // [B, points, channels]
  math::BFloat16* output;
  double* parts;  // [B, chunks, channels, 2], between the kernels
  Chunks chunks;
};

struct ChannelsLastGradient {
  NormGradient norm;
  const math::BFloat16* grad;  // [B, points, channels]
  const math::BFloat16* input;
  math::BFloat16* grad_input;
  float slope;
  double* parts;  // [B, chunks, channels, 2], between the kernels
  Chunks chunks;
};

/// The sums of each channel of each example.
struct ChannelsLastSums {
  const math::BFloat16* input;  // [B, points, channels]
  float* sums;                  // [B, channels]
  double* parts;                // [B, chunks, channels], between the kernels
  Chunks chunks;
};

/// The second needs the first.
TIMM_EXT_KERNEL(channels_last_chunk_sums, const ChannelsLastSums&, int64_t first_chunk, int64_t last_chunk);
TIMM_EXT_KERNEL(channels_last_total_sums, const ChannelsLastSums&, int64_t first_example, int64_t last_example);

/// Each needs the one before it; between the second and the third, norm_statistics and norm_backward_totals.
TIMM_EXT_KERNEL(channels_last_moments, const ChannelsLastProblem&, int64_t first_chunk, int64_t last_chunk);
TIMM_EXT_KERNEL(channels_last_join, const ChannelsLastProblem&, int64_t first_example, int64_t last_example);
TIMM_EXT_KERNEL(channels_last_write, const ChannelsLastProblem&, int64_t first_chunk, int64_t last_chunk);

TIMM_EXT_KERNEL(channels_last_backward_sums, const ChannelsLastGradient&, int64_t first_chunk, int64_t last_chunk);
TIMM_EXT_KERNEL(channels_last_backward_join, const ChannelsLastGradient&, int64_t first_example, int64_t last_example);
TIMM_EXT_KERNEL(channels_last_backward_write, const ChannelsLastGradient&, int64_t first_chunk, int64_t last_chunk);

}  // namespace timm_ext::cpu
