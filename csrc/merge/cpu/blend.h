// SPDX-License-Identifier: Apache-2.0
//
// Values of the elements of a unit for every model, and the weights of a unit with pieces of several segments.
#pragma once

#include "math/shuffle.h"
#include "math/simd.h"
#include "merge/cpu/view.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

template <class C>
constexpr int kLanes = sizeof(typename math::VectorOf<C>::type) / sizeof(C);
template <class C>
constexpr int kVectors = kUnit / kLanes<C>;

/// A value per model and element of a unit: in registers, or in memory [models, kUnit] where the number of models is
/// not known.
template <class C, int N>
class UnitRows {
 public:
  using V = typename math::VectorOf<C>::type;

  UnitRows(C*, int) {}
  TIMM_EXT_FN int models() const { return N; }
  TIMM_EXT_FN V get(int t, int v) const { return values_[t][v]; }
  TIMM_EXT_FN void set(int t, int v, V value) { values_[t][v] = value; }

 private:
  V values_[N][kVectors<C>];
};
template <class C>
class UnitRows<C, 0> {
 public:
  using V = typename math::VectorOf<C>::type;

  UnitRows(C* memory, int models) : memory_(memory), models_(models) {}
  TIMM_EXT_FN int models() const { return models_; }
  TIMM_EXT_FN V get(int t, int v) const { return math::load<V>(memory_ + t * kUnit + v * kLanes<C>); }
  TIMM_EXT_FN void set(int t, int v, V value) { math::store(memory_ + t * kUnit + v * kLanes<C>, value); }

 private:
  C* memory_;
  int models_;
};

/// Sets all of them to f(t, v).
template <class C, int N, class F>
TIMM_EXT_FN void set_rows(UnitRows<C, N>& rows, const F& f) {
  for (int t = 0; t < rows.models(); ++t) {
    for (int v = 0; v < kVectors<C>; ++v) rows.set(t, v, f(t, v));
  }
}

/// Finds the segments that end in the units of a view; units come in order.
class SegmentEnds {
 public:
  template <class C>
  explicit SegmentEnds(const View<C>& view) : end_(view.ends), last_(view.begin + view.count - 1) {}

  /// Calls f(i) for each segment that ends with element i - 1 of the unit that begins at `begin` of the buffer, but not
  /// for the view's last segment.
  template <class F>
  TIMM_EXT_FN void in_unit(int64_t begin, const F& f) {
    const int64_t last = begin + kUnit < last_ ? begin + kUnit : last_;
    for (; *end_ <= last; ++end_) f(*end_ - begin);
  }

 private:
  const int64_t* end_;
  int64_t last_;
};

/// Weights of the elements of a unit, blended from those of its segments.
template <class C, int N>
class BlendedAlpha {
 public:
  explicit BlendedAlpha(const View<C>& view) : row_(view.alpha), ends_(view), unit_(view.unit_alpha, view.models) {}

  TIMM_EXT_FN auto get(int t, int v) const { return unit_.get(t, v); }

  /// Goes on to the unit that begins at element `begin` of the buffer.
  TIMM_EXT_FN void set_unit(int64_t begin) {
    using V = typename math::VectorOf<C>::type;
    set_rows(unit_, [&](int t, int) { return V{} + row_[t]; });
    ends_.in_unit(begin, [&](int64_t cut) {
      row_ += unit_.models();
      set_rows(unit_,
               [&](int t, int v) { return math::join_lanes(unit_.get(t, v), V{} + row_[t], cut - v * kLanes<C>); });
    });
  }

 private:
  const C* row_;  // of the segment in which the next unit begins
  SegmentEnds ends_;
  UnitRows<C, N> unit_;
};

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
