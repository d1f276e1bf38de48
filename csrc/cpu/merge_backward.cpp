// SPDX-License-Identifier: Apache-2.0
//
// Gradient of the log-weights: Σ over a segment of g (θ_t - θ*) w_t / Σw. Lanes of arithmetic type within a chunk
// (element i of a view goes to lane i % kUnit), float64 beyond.
#include "dispatch.h"
#include "merge_units.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

/// Adds terms up in lanes, [models, kUnit]: in registers, or in memory where the number of models is not known.
template <class C, int N>
struct Lanes {
  using V = typename math::VectorOf<C>::type;
  V values[N][kVectors<C>] = {};

  Lanes(C*, int) {}
  TIMM_EXT_FN void take(int t, int v, int64_t, V term) { values[t][v] += term; }
  TIMM_EXT_FN void write(C* lanes) const {
    for (int t = 0; t < N; ++t) {
      for (int v = 0; v < kVectors<C>; ++v) math::store(lanes + t * kUnit + v * kLanes<C>, values[t][v]);
    }
  }
};
template <class C>
struct Lanes<C, 0> {
  using V = typename math::VectorOf<C>::type;
  C* lanes;

  Lanes(C* memory, int models) : lanes(memory) {
    for (int i = 0; i < models * kUnit; ++i) lanes[i] = 0;
  }
  TIMM_EXT_FN void take(int t, int v, int64_t, V term) {
    C* const lane = lanes + t * kUnit + v * kLanes<C>;
    math::store(lane, math::load<V>(lane) + term);
  }
  TIMM_EXT_FN void write(C*) const {}
};

/// Keeps all terms, [models, kChunk].
template <class C>
struct TermRows {
  C* rows;

  template <class V>
  TIMM_EXT_FN void take(int t, int v, int64_t unit, V term) {
    math::store(rows + t * kChunk + unit + v * kLanes<C>, term);
  }
};

/// Hands g (θ_t - θ*) w_t / Σw of a unit to `sink`.
template <Scaling How, class C, class R, class Sink>
TIMM_EXT_FN void for_unit_terms(const R& rows, const C* gradient, int64_t unit, Sink& sink) {
  using V = typename math::VectorOf<C>::type;
  for (int v = 0; v < kVectors<C>; ++v) {
    const VectorElement<R> element{rows, unit + v * kLanes<C>};
    const V g = math::load<V>(gradient + element.i);
    if (element.models() == 2) {
      const V term = g * math::merge_exchange<V, How>(element);
      sink.take(0, v, unit, term);
      sink.take(1, v, unit, -term);
      continue;
    }
    const auto m = math::merge<V, How>(element, element.models());
    for (int t = 0; t < element.models(); ++t) {
      sink.take(t, v, unit, g * math::merge_offset(element, m, t) * math::merge_share(element, m, t));
    }
  }
}

/// Writes the terms of a unit to [models, kUnit]. Out of line: the registers of the loop around it stay its own.
template <class C, class R>
__attribute__((noinline)) void scaled_terms(const R& rows, const C* gradient, int64_t unit, C* terms) {
  struct {
    C* terms;
    TIMM_EXT_FN void take(int t, int v, int64_t, typename math::VectorOf<C>::type term) {
      math::store(terms + t * kUnit + v * kLanes<C>, term);
    }
  } sink{terms};
  for_unit_terms<Scaling::kFull>(rows, gradient, unit, sink);
}

/// Hands g (θ_t - θ*) w_t / Σw of all units of a view to `sink`.
template <class C, class R, class Sink>
TIMM_EXT_FN void for_each_term(const View<C>& view, const C* gradient, C* spare, const R& rows, Sink& sink) {
  for (int64_t unit = 0; unit < view.count; unit += kUnit) {
    if (__builtin_expect(needs_no_scaling(rows, unit), 1)) {
      for_unit_terms<Scaling::kNone>(rows, gradient, unit, sink);
    } else {
      scaled_terms(rows, gradient, unit, spare);
      for (int t = 0; t < rows.models(); ++t) {
        for (int v = 0; v < kVectors<C>; ++v) {
          using V = typename math::VectorOf<C>::type;
          sink.take(t, v, unit, math::load<V>(spare + t * kUnit + v * kLanes<C>));
        }
      }
    }
  }
}

template <class C>
struct AddUnits {
  const C* gradient;
  C* spare;  // [models, kUnit]
  C* lanes;  // [models, kUnit]

  template <class R>
  void run(const View<C>& view) const {
    const R rows(view);
    Lanes<C, R::kModels> sink(lanes, view.models);
    for_each_term(view, gradient, spare, rows, sink);
    sink.write(lanes);
  }
};

template <class C>
struct KeepTerms {
  const C* gradient;
  C* spare;  // [models, kUnit]
  C* terms;  // [models, kChunk]

  template <class R>
  void run(const View<C>& view) const {
    TermRows<C> sink{terms};
    for_each_term(view, gradient, spare, R(view), sink);
  }
};

/// Σ of kUnit lanes.
template <class C>
TIMM_EXT_FN double lane_sum(const C* lanes) {
  using V = typename math::VectorOf<C>::type;
  V vectors[kVectors<C>];
  for (int v = 0; v < kVectors<C>; ++v) vectors[v] = math::load<V>(lanes + v * kLanes<C>);
  return math::pairwise_sum(vectors);
}

/// Σ of terms, term i in lane i % kUnit.
template <class C>
TIMM_EXT_FN double term_sum(const C* terms, int64_t count) {
  using V = typename math::VectorOf<C>::type;
  V lanes[kVectors<C>] = {};
  int64_t i = 0;
  for (; i + kUnit <= count; i += kUnit) {
    for (int v = 0; v < kVectors<C>; ++v) lanes[v] += math::load<V>(terms + i + v * kLanes<C>);
  }
  for (int v = 0; v < kVectors<C>; ++v, i += kLanes<C>) {
    lanes[v] += math::first_lanes(math::load<V>(terms + i), count - i);
  }
  return math::pairwise_sum(lanes);
}

template <class S, class C>
class BackwardVisitor {
 public:
  BackwardVisitor(const MergeInputs& in, const MergeGradient& gradient, C* result, double* edges)
      : in_(in),
        gradient_(gradient),
        result_(result),
        edges_(edges),
        row_(kChunk),
        spare_(in.models * kUnit),
        lanes_(in.models * kUnit),
        terms_(in.models * kChunk + kUnit),
        sums_(in.models) {}

  void block_begins(int64_t begin) {
    block_ = begin;
    clear();
  }

  void view(const View<C>& view) {
    const C* const gradient = gradient_row<S>(gradient_, view, row_.get());
    if (view.spread) return with_rows(view, KeepTerms<C>{gradient, spare_.get(), terms_.get()});
    with_rows(view, AddUnits<C>{gradient, spare_.get(), lanes_.get()});
    for (int k = 0; k < view.models; ++k) sums_.get()[view.model(k)] += lane_sum(lanes_.get() + k * kUnit);
  }

  void piece(const View<C>& view, int64_t, int64_t from, int64_t to) {
    for (int t = 0; t < view.models; ++t) sums_.get()[t] += term_sum(terms_.get() + t * kChunk + from, to - from);
  }

  void whole_segments(const View<C>& view, int64_t first, int64_t last) {
    const C* const terms = terms_.get() - view.begin;
    for (int64_t segment = first; segment < last; ++segment) {
      const int64_t begin = in_.offsets[segment], count = in_.offsets[segment + 1] - begin;
      C* const row = result_ + segment * view.models;
      row[0] = static_cast<C>(term_sum(terms + begin, count));
      if (view.models == 2) {
        row[1] = -row[0];
        continue;
      }
      for (int t = 1; t < view.models; ++t) row[t] = static_cast<C>(term_sum(terms + t * kChunk + begin, count));
    }
  }

  void segment_ends(int64_t segment, bool cut) {
    const bool enters = in_.offsets[segment] > block_;
    double* const edge = edges_ + (block_ / kBlock * 2 + enters) * in_.models;
    C* const row = result_ + segment * in_.models;
    for (int64_t t = 0; t < in_.models; ++t) {
      if (cut) {
        edge[t] = sums_.get()[t];
      } else {
        row[t] = static_cast<C>(sums_.get()[t]);
      }
    }
    clear();
  }

 private:
  void clear() {
    for (int64_t t = 0; t < in_.models; ++t) sums_.get()[t] = 0;
  }

  const MergeInputs& in_;
  const MergeGradient& gradient_;
  C* const result_;
  double* const edges_;
  int64_t block_ = 0;
  Buffer<C> row_;
  Buffer<C> spare_;
  Buffer<C> lanes_;
  Buffer<C> terms_;
  Buffer<double> sums_;
};

}  // namespace

void merge_backward_log_weight(const MergeInputs& in, const MergeGradient& gradient, void* grad_log_weight,
                               double* edges, int64_t first_block, int64_t last_block) {
  with_storage(in.element, [&](auto* s) {
    using S = Pointee<decltype(s)>;
    using C = Arithmetic<decltype(s)>;
    BackwardVisitor<S, C> visitor(in, gradient, static_cast<C*>(grad_log_weight), edges);
    Walk<S, C, decltype(visitor)>(in, visitor).blocks(first_block, last_block);
  });
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
