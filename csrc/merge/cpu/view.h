// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of the merge see of the flat buffer at a time: part of a chunk in arithmetic type. A chunk is worked
// in units of kUnit elements, whatever the vectors' width, so that every instruction set makes the same decisions. A
// chunk inside one segment has one weight α_t per model; in a chunk of several segments each has a row of them, from
// which a unit blends its own.
#pragma once

#include <cstring>

#include "cpu/buffer.h"
#include "cpu/storage.h"
#include "math/exp.h"
#include "merge/cpu/kernels.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

constexpr int64_t kChunk = 512;
constexpr int64_t kUnit = 16;

constexpr int64_t whole_units(int64_t count) { return (count + kUnit - 1) / kUnit * kUnit; }

/// Part of a chunk in arithmetic type, padded to whole units by elements whose merge is 0.
template <class C>
struct View {
  int64_t begin;  // in the buffer
  int64_t count;
  int64_t segment;  // the first one
  int64_t segments;
  const int64_t* ends;  // of the segments in the buffer, the last one beyond the view; null for one segment
  int models;
  const int64_t* index;       // [models], of the models in the matrices; null where they are all there
  const C* const* theta;      // [models] rows
  const C* const* fisher;     // [models] rows, or null
  const C* alpha;             // [segments, models]
  C* unit_alpha;              // [models, kUnit], room for those of a unit
  const char* const* stored;  // [models, 2] rows of θ and F in storage, where that is half as wide; else null

  int64_t model(int k) const { return index == nullptr ? k : index[k]; }
};

/// A row in arithmetic type with whole units: the storage itself where it is one.
template <class C, class S>
const C* padded_row(const S* from, int64_t count, C* scratch, C padding) {
  if constexpr (std::is_same_v<S, C>) {
    if (count % kUnit == 0) return from;
    std::memcpy(scratch, from, count * sizeof(C));
  } else {
    widen(from, count, scratch);
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
        stored_(2 * in.models),
        index_(in.models),
        alpha_(in.models),
        unit_alpha_(in.models * kUnit),
        differences_(in.models * kChunk + kUnit),
        relative_(in.models * kChunk + kUnit) {}

  /// A view of elements inside one segment; models without weight are left out.
  View<C> of_segment(int64_t segment, int64_t begin, int64_t count) {
    set_weights(segment);
    set_rows(index_.get(), active_, begin, count);
    return {begin,       count,         segment,      1,       nullptr,      active_, index_.get(),
            rows_.get(), fisher_rows(), alpha_.get(), nullptr, stored_rows()};
  }

  /// Sets a view of a chunk with pieces of the segments [first, last]; false where a weight is 0 or NaN.
  bool of_segments(int64_t first, int64_t last, int64_t begin, int64_t count, View<C>& view) {
    if (!set_relative_weights(first, last)) return false;
    const int64_t* const ends = in_.offsets + first + 1;
    set_rows(nullptr, in_.models, begin, count);
    view = {begin,       count,         first,           last - first + 1,  ends,         int(in_.models), nullptr,
            rows_.get(), fisher_rows(), relative_.get(), unit_alpha_.get(), stored_rows()};
    return true;
  }

 private:
  const C* const* fisher_rows() const { return in_.fisher == nullptr ? nullptr : rows_.get() + in_.models; }

  const char* const* stored_rows() const { return std::is_same_v<S, C> ? nullptr : stored_.get(); }

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

  const C* row(const void* matrix, int64_t offset, int64_t count, int64_t slot, C padding) const {
    const S* const from = static_cast<const S*>(matrix) + offset;
    stored_.get()[slot] = reinterpret_cast<const char*>(from);
    return padded_row(from, count, scratch_.get() + slot * kChunk, padding);
  }

  /// Weights of the segments [first, last], up to a factor of their row; false where one is 0.
  bool set_relative_weights(int64_t first, int64_t last) {
    const int64_t count = (last - first + 1) * in_.models;
    const C* const log_weight = static_cast<const C*>(in_.log_weight) + first * in_.models;
    // Rows as log_weights() gives them, and without small weights, need no look at their maximum.
    return exponentials(log_weight, count) || exponentials(differences(log_weight, last - first + 1), count);
  }

  /// relative_ = exp(x); false where an x is not in [-69, 0], in which the weights are above 0.
  bool exponentials(const C* x, int64_t count) {
    using V = math::DoubleV;
    constexpr int64_t width = sizeof(V) / sizeof(double);
    bool within = true;
    int64_t i = 0;
    for (; i + width <= count; i += width) within &= exponential(math::load_doubles(x + i), i);
    if (i == count) return within;
    C rest[width] = {};
    std::memcpy(rest, x + i, (count - i) * sizeof(C));
    return within & exponential(math::load_doubles(rest), i);
  }

  TIMM_EXT_FN bool exponential(math::DoubleV x, int64_t i) {
    math::store_as(relative_.get() + i, math::exp_nonpositive<math::kExpTerms<C>>(x));
    return math::all_within(x, -69.0, 0.0);
  }

  /// Log-weights minus their row's largest. NaN, +inf or a row of -inf give NaN.
  const C* differences(const C* log_weight, int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
      const C* const from = log_weight + row * in_.models;
      const double largest = math::row_maximum(from, in_.models);
      for (int64_t t = 0; t < in_.models; ++t) {
        differences_.get()[row * in_.models + t] = static_cast<C>(from[t] - largest);
      }
    }
    return differences_.get();
  }

  const MergeInputs& in_;
  Buffer<C> scratch_;
  Buffer<const C*> rows_;
  Buffer<const char*> stored_;
  Buffer<int64_t> index_;
  Buffer<C> alpha_;
  Buffer<C> unit_alpha_;
  Buffer<C> differences_;
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

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
