// SPDX-License-Identifier: Apache-2.0
//
// How the kernels of the merge walk the flat buffer. A block is cut into chunks of kChunk elements that stay in the
// first-level cache, at fixed places of the buffer; a chunk is worked in units of kUnit elements, whatever the vectors'
// width, so that every instruction set makes the same decisions. A chunk inside one segment has one weight α_t per
// model; in a chunk of several segments the weights are spread over rows, one weight per element.
#pragma once

#include <cstring>

#include "../math/exp.h"
#include "../math/tiles.h"
#include "buffer.h"
#include "kernels.h"
#include "storage.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

constexpr int64_t kChunk = 512;
constexpr int64_t kUnit = 16;
constexpr int64_t kSpread = kChunk + kUnit;  // between rows of spread weights

constexpr int64_t whole_units(int64_t count) { return (count + kUnit - 1) / kUnit * kUnit; }

/// Part of a chunk in arithmetic type, padded to whole units by elements whose merge is 0.
template <class C>
struct View {
  int64_t begin;  // in the buffer
  int64_t count;  // elements without the padding
  bool spread;    // alpha is [models, kSpread], else [models]
  int models;
  const int64_t* index;    // [models], of the models in the planes; null where they are all there
  const C* const* theta;   // [models] rows
  const C* const* fisher;  // [models] rows, or null
  const C* alpha;

  int64_t model(int k) const { return index == nullptr ? k : index[k]; }
};

/// A row in arithmetic type with whole units: the storage itself where it is one.
template <class C, class S>
const C* padded_row(const S* from, int64_t count, C* scratch, C padding) {
  if constexpr (std::is_same_v<S, C>) {
    if (count % kUnit == 0) return from;
    std::memcpy(scratch, from, count * sizeof(C));
  } else {
    for (int64_t i = 0; i < count; ++i) scratch[i] = to_float(from[i]);
  }
  for (int64_t i = count; i < whole_units(count); ++i) scratch[i] = padding;
  return scratch;
}

/// Sets weights and rows of views. S is the storage type, C the arithmetic type.
template <class S, class C>
class ViewReader {
 public:
  explicit ViewReader(const MergeInputs& in)
      : in_(in),
        scratch_(2 * in.models * kChunk),
        rows_(2 * in.models),
        index_(in.models),
        alpha_(in.models),
        spread_(in.models * kSpread),
        differences_(in.models * kChunk + kUnit),
        relative_(in.models * kChunk + kUnit) {}

  /// A view of elements inside one segment; models without weight are left out.
  View<C> of_segment(int64_t segment, int64_t begin, int64_t count) {
    set_weights(segment);
    set_rows(index_.get(), active_, begin, count);
    return {begin, count, false, active_, index_.get(), rows_.get(), fisher_rows(), alpha_.get()};
  }

  /// Sets a view of a chunk with pieces of the segments [first, last]; false where a model has no weight somewhere.
  bool of_segments(int64_t first, int64_t last, int64_t begin, int64_t count, View<C>& view) {
    if (!spread_weights(first, last, begin, count)) return false;
    set_rows(nullptr, in_.models, begin, count);
    view = {begin, count, true, int(in_.models), nullptr, rows_.get(), fisher_rows(), spread_.get()};
    return true;
  }

 private:
  const C* const* fisher_rows() const { return in_.fisher == nullptr ? nullptr : rows_.get() + in_.models; }

  void set_weights(int64_t segment) {
    if (segment == segment_) return;
    segment_ = segment;
    const C* const log_weight = static_cast<const C*>(in_.log_weight) + segment * in_.models;
    const double largest = math::row_maximum(log_weight, in_.models);
    active_ = 0;
    for (int64_t t = 0; t < in_.models; ++t) {
      const C alpha = math::relative_weight<C>(log_weight[t], largest);
      if (alpha == 0) continue;
      index_.get()[active_] = t;
      alpha_.get()[active_++] = alpha;
    }
  }

  void set_rows(const int64_t* index, int64_t models, int64_t begin, int64_t count) {
    for (int64_t k = 0; k < models; ++k) {
      const int64_t t = index == nullptr ? k : index[k];
      rows_.get()[k] = row(in_.theta, t * in_.theta_stride + begin, count, 2 * k, C(0));
      if (in_.fisher != nullptr) {
        rows_.get()[in_.models + k] = row(in_.fisher, t * in_.fisher_stride + begin, count, 2 * k + 1, C(1));
      }
    }
  }

  const C* row(const void* plane, int64_t offset, int64_t count, int64_t slot, C padding) const {
    return padded_row(static_cast<const S*>(plane) + offset, count, scratch_.get() + slot * kChunk, padding);
  }

  /// α of the segments, each over its elements; false where one is 0.
  bool spread_weights(int64_t first, int64_t last, int64_t begin, int64_t count) {
    const int64_t models = in_.models;
    set_differences(first, last - first + 1);
    if (!set_relative_weights((last - first + 1) * models)) return false;
    const C* alpha = relative_.get();
    for (int64_t s = first; s <= last; ++s) {
      const int64_t from = in_.offsets[s] > begin ? in_.offsets[s] - begin : 0;
      const int64_t to = s < last ? in_.offsets[s + 1] - begin : whole_units(count);
      for (int64_t t = 0; t < models; ++t) {
        fill_units(spread_.get() + t * kSpread, from, to, *alpha++);
      }
    }
    return true;
  }

  /// Sets all units that begin in [from, to); what is beyond is overwritten by the next segment.
  static void fill_units(C* row, int64_t from, int64_t to, C value) {
    for (int64_t i = from; i < to; i += kUnit) {
      for (int64_t lane = 0; lane < kUnit; ++lane) row[i + lane] = value;
    }
  }

  /// Differences of log-weights to their row's maximum. NaN, +inf or a row of -inf give NaN.
  void set_differences(int64_t first, int64_t rows) {
    switch (in_.models) {
      case 2:
        return set_differences_of<2>(first, rows);
      case 3:
        return set_differences_of<3>(first, rows);
      default:
        return set_differences_of<0>(first, rows);
    }
  }

  template <int N>
  void set_differences_of(int64_t first, int64_t rows) {
    const int64_t models = N > 0 ? N : in_.models;
    const C* const log_weight = static_cast<const C*>(in_.log_weight) + first * models;
    double* const values = differences_.get();
    for (int64_t row = 0; row < rows; ++row) {
      C largest = log_weight[row * models];
      for (int64_t t = 1; t < models; ++t) largest = math::larger(log_weight[row * models + t], largest);
      for (int64_t t = 0; t < models; ++t) {
        values[row * models + t] = double(log_weight[row * models + t]) - double(largest);
      }
    }
  }

  /// Relative weights of the first differences; false where one is 0.
  bool set_relative_weights(int64_t count) {
    using V = math::DoubleV;
    constexpr int64_t width = sizeof(V) / sizeof(double);
    double* const differences = differences_.get();
    for (int64_t i = count; i < count + width; ++i) differences[i] = 0;
    V smallest = V{} + 1;
    for (int64_t i = 0; i < count; i += width) {
      const V weight = math::weight_below_maximum<C>(math::load<V>(differences + i));
      smallest = math::smaller(weight, smallest);
      math::store_as(relative_.get() + i, weight);
    }
    bool all = true;
    for (int64_t lane = 0; lane < width; ++lane) all &= smallest[lane] != 0;
    return all;
  }

  const MergeInputs& in_;
  Buffer<C> scratch_;
  Buffer<const C*> rows_;
  Buffer<int64_t> index_;
  Buffer<C> alpha_;
  Buffer<C> spread_;
  Buffer<double> differences_;
  Buffer<C> relative_;
  int64_t segment_ = -1;
  int active_ = 0;
};

/// The incoming gradient of a view in arithmetic type.
template <class S, class C>
const C* gradient_row(const MergeGradient& gradient, const View<C>& view, C* scratch) {
  const S* const values = static_cast<const S*>(gradient.values);
  if (gradient.stride != 0) return padded_row(values + view.begin, view.count, scratch, C(0));
  const C value = *widen(values, 1, scratch);
  for (int64_t i = 0; i < whole_units(view.count); ++i) scratch[i] = value;
  return scratch;
}

/// Walks the blocks and calls, in order:
///   visitor.block_begins(begin)
///   visitor.view(view)                     elements of one segment, or of several where view.spread
///   visitor.piece(view, segment, from, to) after a spread view, for each segment's part [from, to) of it
///   visitor.segment_ends(segment, cut)     after its last part in this block; cut: others lie in other blocks
template <class S, class C, class Visitor>
void for_each_view(const MergeInputs& in, int64_t first_block, int64_t last_block, Visitor& visitor) {
  ViewReader<S, C> reader(in);
  View<C> view;
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t begin = block * kBlock;
    const int64_t end = begin + kBlock < in.elements ? begin + kBlock : in.elements;
    visitor.block_begins(begin);
    int64_t segment = math::find_segment(in.offsets, in.segments, begin);
    for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
      const int64_t chunk_end = chunk + kChunk < end ? chunk + kChunk : end;
      int64_t last = segment;
      while (in.offsets[last + 1] < chunk_end) ++last;
      const bool spread = last > segment && reader.of_segments(segment, last, chunk, chunk_end - chunk, view);
      if (spread) visitor.view(view);
      for (int64_t s = segment; s <= last; ++s) {
        const int64_t from = in.offsets[s] > chunk ? in.offsets[s] : chunk;
        const int64_t to = in.offsets[s + 1] < chunk_end ? in.offsets[s + 1] : chunk_end;
        if (spread) {
          visitor.piece(view, s, from - chunk, to - chunk);
        } else {
          visitor.view(reader.of_segment(s, from, to - from));
        }
        const bool goes_on = in.offsets[s + 1] > end;
        if (in.offsets[s + 1] <= chunk_end || (goes_on && chunk_end == end)) {
          visitor.segment_ends(s, goes_on || in.offsets[s] < begin);
        }
      }
      segment = in.offsets[last + 1] <= chunk_end ? last + 1 : last;
    }
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
