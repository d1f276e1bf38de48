// SPDX-License-Identifier: Apache-2.0
#include "norm/cpu/channels_last.h"
#include "norm/cpu/chunk.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

void channels_last_chunk_sums(const ChannelsLastSums& p, int64_t first_chunk, int64_t last_chunk) {
  const Row sums(p.chunks);
  for (int64_t number = first_chunk; number < last_chunk; ++number) {
    const Chunk chunk(p.chunks, number);
    const math::BFloat16* const input = p.input + chunk.first;
    for (int64_t column = 0; column < p.chunks.width; column += kColumns) {
      V plain[kVectors] = {};
      for (int64_t row = column; row < chunk.whole; row += p.chunks.width) {
        for (int v = 0; v < kVectors; ++v) plain[v] += math::load_floats(input + row + v * kLanes);
      }
      for (int v = 0; v < kVectors; ++v) math::store(sums.get() + column + v * kLanes, plain[v]);
    }
    for (int64_t i = chunk.whole; i < chunk.elements; ++i) sums.get()[i - chunk.whole] += math::to_float(input[i]);
    for (int64_t c = 0; c < p.chunks.channels; ++c) p.parts[number * p.chunks.channels + c] = sums.sum(c);
  }
}

void channels_last_total_sums(const ChannelsLastSums& p, int64_t first_example, int64_t last_example) {
  const int64_t channels = p.chunks.channels;
  for (int64_t example = first_example; example < last_example; ++example) {
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < p.chunks.count; ++i) sum += p.parts[(example * p.chunks.count + i) * channels + c];
      p.sums[example * channels + c] = static_cast<float>(sum);
    }
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
