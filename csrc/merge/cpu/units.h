// SPDX-License-Identifier: Apache-2.0
//
// The merge of the units of a view. Almost always Σ w lies far from both ends of the range, and then scaling the
// Fishers changes no bit: such units take the short form, the others the full one.
#pragma once

#include "math/merge.h"
#include "merge/cpu/blend.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

using math::Scaling;

/// What a body may hold in registers of a View: constants instead of pointers where the number of models N is known
/// (N = 0: it is not).
template <class T, int N>
struct PerModel {
  T values[N];
  explicit PerModel(const T* from) {
    for (int t = 0; t < N; ++t) values[t] = from[t];
  }
  TIMM_EXT_FN const T& operator[](int t) const { return values[t]; }
};
template <class T>
struct PerModel<T, 0> {
  const T* values;
  explicit PerModel(const T* from) : values(from) {}
  TIMM_EXT_FN const T& operator[](int t) const { return values[t]; }
};

template <class C_, bool Weighted_, bool Blended_, int N_>
struct Rows {
  using C = C_;
  using Alpha = std::conditional_t<Blended_, BlendedAlpha<C, N_>, PerModel<C, N_>>;
  static constexpr bool kWeighted = Weighted_;
  static constexpr bool kBlended = Blended_;
  static constexpr int kModels = N_;

  explicit Rows(const View<C>& view)
      : count(view.models), theta(view.theta), fisher(Weighted_ ? view.fisher : view.theta), alpha(alpha_of(view)) {}

  TIMM_EXT_FN int models() const { return N_ > 0 ? N_ : count; }

  int count;
  PerModel<const C*, N_> theta;
  PerModel<const C*, N_> fisher;
  Alpha alpha;

 private:
  static TIMM_EXT_FN Alpha alpha_of(const View<C>& view) {
    if constexpr (Blended_) {
      return Alpha(view);
    } else {
      return Alpha(view.alpha);
    }
  }
};

/// Elements ahead of the work that are fetched: some 8 KiB on the way at a time, whatever the number of rows. The CPU's
/// own prefetching comes later and ends with each page.
template <class R>
TIMM_EXT_FN int64_t elements_ahead(const R& rows) {
  return rows.models() * (R::kWeighted ? 2 : 1) <= 4 ? 512 : 256;
}

template <class R>
TIMM_EXT_FN void fetch_ahead(const R& rows, int64_t unit) {
  const int64_t ahead = unit + elements_ahead(rows);
  for (int t = 0; t < rows.models(); ++t) {
    __builtin_prefetch(rows.theta[t] + ahead);
    if constexpr (R::kWeighted) __builtin_prefetch(rows.fisher[t] + ahead);
  }
}

/// Half-wide rows are brought to arithmetic type a chunk at a time: the next one's are fetched while this one is
/// worked.
template <class R>
TIMM_EXT_FN void fetch_stored(const R& rows, const char* const* stored, int64_t unit) {
  const int64_t ahead = (unit + kChunk) * sizeof(typename R::C) / 2;
  for (int t = 0; t < rows.models(); ++t) {
    __builtin_prefetch(stored[2 * t] + ahead);
    if constexpr (R::kWeighted) __builtin_prefetch(stored[2 * t + 1] + ahead);
  }
}

/// Calls f(rows, unit) for the units of a view.
template <class R, class F>
TIMM_EXT_FN void for_each_unit(const View<typename R::C>& view, const F& f) {
  R rows(view);
  const char* const* const stored = view.stored;
  for (int64_t unit = 0; unit < view.count; unit += kUnit) {
    stored == nullptr ? fetch_ahead(rows, unit) : fetch_stored(rows, stored, unit);
    if constexpr (R::kBlended) rows.alpha.set_unit(view.begin + unit);
    f(rows, unit);
  }
}

/// The inputs of the vector of elements from i on.
template <class R>
struct VectorElement {
  using V = typename math::VectorOf<typename R::C>::type;
  static constexpr bool kWeighted = R::kWeighted;

  const R& rows;
  int64_t i;
  int v;

  TIMM_EXT_FN V theta(int t) const { return math::load<V>(rows.theta[t] + i); }
  TIMM_EXT_FN V fisher(int t) const { return math::load<V>(rows.fisher[t] + i); }
  TIMM_EXT_FN auto alpha(int t) const {
    if constexpr (R::kBlended) {
      return rows.alpha.get(t, v);
    } else {
      return rows.alpha[t];
    }
  }
  TIMM_EXT_FN int models() const { return rows.models(); }
};

/// Vector v of a unit.
template <class R>
TIMM_EXT_FN VectorElement<R> element_of(const R& rows, int64_t unit, int v) {
  return {rows, unit + v * kLanes<typename R::C>, v};
}

/// Whether Σ w of each element lies in a range where neither w nor 1 / Σ w needs the scaling.
template <class R>
TIMM_EXT_FN bool needs_no_scaling(const R& rows, int64_t unit) {
  using C = typename R::C;
  if constexpr (!R::kWeighted) return true;
  constexpr C bound = sizeof(C) == sizeof(float) ? C(0x1p60) : C(0x1p400);
  bool within = true;
  for (int v = 0; v < kVectors<C>; ++v) {
    const auto element = element_of(rows, unit, v);
    auto total = element.fisher(0) * element.alpha(0);
    for (int t = 1; t < element.models(); ++t) total += element.fisher(t) * element.alpha(t);
    within &= math::all_within(total, 1 / bound, bound);
  }
  return within;
}

template <class Body, class C, bool Weighted, bool Blended>
void with_models(const View<C>& view, const Body& body) {
  if constexpr (sizeof(C) == sizeof(float)) {
    switch (view.models) {
      case 2:
        return body.template run<Rows<C, Weighted, Blended, 2>>(view);
      case 3:
        return body.template run<Rows<C, Weighted, Blended, 3>>(view);
      case 4:
        return body.template run<Rows<C, Weighted, Blended, 4>>(view);
      case 5:
        return body.template run<Rows<C, Weighted, Blended, 5>>(view);
      case 8:
        return body.template run<Rows<C, Weighted, Blended, 8>>(view);
    }
  }
  return body.template run<Rows<C, Weighted, Blended, 0>>(view);
}

/// Calls body.template run<R>(view), R being the Rows that suit the view.
template <class Body, class C>
void with_rows(const View<C>& view, const Body& body) {
  if (view.fisher != nullptr) {
    view.ends != nullptr ? with_models<Body, C, true, true>(view, body) : with_models<Body, C, true, false>(view, body);
  } else {
    view.ends != nullptr ? with_models<Body, C, false, true>(view, body)
                         : with_models<Body, C, false, false>(view, body);
  }
}

/// The same, less code and slower.
template <class Body, class C>
void with_any_models(const View<C>& view, const Body& body) {
  if (view.fisher != nullptr) {
    view.ends != nullptr ? body.template run<Rows<C, true, true, 0>>(view)
                         : body.template run<Rows<C, true, false, 0>>(view);
  } else {
    view.ends != nullptr ? body.template run<Rows<C, false, true, 0>>(view)
                         : body.template run<Rows<C, false, false, 0>>(view);
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
