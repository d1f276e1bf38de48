// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/buffer.h"
#include "cpu/lanes.h"
#include "math/simd_half.h"
#include "norm/cpu/channels_last.h"
#include "norm/cpu/column_sums.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

/// Where a chunk of all examples lies.
struct Chunk {
  Chunk(const Chunks& chunks, int64_t number)
      : example(number / chunks.count),
        first(example * chunks.elements + number % chunks.count * chunks.size),
        elements(smaller_of(chunks.size, (example + 1) * chunks.elements - first)),
        whole(elements / chunks.width * chunks.width) {}

  int64_t example;
  int64_t first;
  int64_t elements;
  int64_t whole;  // elements of whole rows
};

/// A number for each channel, repeated over a row.
class Row {
 public:
  explicit Row(const Chunks& chunks) : channels_(chunks.channels), width_(chunks.width), values_(chunks.width) {}

  template <class F>
  void fill(const F& of_channel) const {
    for (int64_t c = 0; c < channels_; ++c) values_.get()[c] = of_channel(c);
    for (int64_t i = channels_; i < width_; ++i) values_.get()[i] = values_.get()[i - channels_];
  }

  /// The sum of a channel's columns.
  double sum(int64_t channel) const {
    double sum = 0;
    for (int64_t i = channel; i < width_; i += channels_) sum += values_.get()[i];
    return sum;
  }

  float* get() const { return values_.get(); }
  V at(int64_t column) const { return math::load<V>(values_.get() + column); }

 private:
  int64_t channels_;
  int64_t width_;
  Buffer<float> values_;
};

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
