// SPDX-License-Identifier: Apache-2.0
//
// Gradient of the log-weights: Σ over a segment of g (θ_t - θ*) w_t / Σw. Lanes of arithmetic type within a chunk
// (element i of a view goes to lane i % kUnit), float64 beyond.
#include "cpu/dispatch.h"
#include "math/row_sums.h"
#include "math/shuffle.h"
#include "merge/cpu/units.h"
#include "merge/cpu/walk.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

/// Sets `terms` to g (θ_t - θ*) w_t / Σw of a unit; of two models only the first one's, since the other's is its
/// negative.
template <Scaling How, class C, class R, int N>
TIMM_EXT_FN void set_terms(const R& rows, const C* gradient, int64_t unit, UnitRows<C, N>& terms) {
  using V = typename math::VectorOf<C>::type;
  for (int v = 0; v < kVectors<C>; ++v) {
    const auto element = element_of(rows, unit, v);
    const V g = math::load<V>(gradient + element.i);
    if (element.models() == 2) {
      terms.set(0, v, g * math::merge_exchange<V, How>(element));
      continue;
    }
    const auto m = math::merge<V, How>(element, element.models());
    for (int t = 0; t < element.models(); ++t) {
      terms.set(t, v, g * math::merge_offset(element, m, t) * math::merge_share(element, m, t));
    }
  }
}

/// Out of line: the registers of the loop around it stay its own.
template <class C, class R>
__attribute__((noinline)) void set_scaled_terms(const R& rows, const C* gradient, int64_t unit, UnitRows<C, 0>& terms) {
  set_terms<Scaling::kFull>(rows, gradient, unit, terms);
}

/// Sums g (θ_t - θ*) w_t / Σw over each segment's part of a view in kUnit lanes; of two models only the first one's.
template <class C>
struct SumUnits {
  using V = typename math::VectorOf<C>::type;

  const C* gradient;
  const char* stored_gradient;  // if half as wide, else null
  C* terms_memory;              // [models, kUnit]
  C* lanes_memory;              // [models, kUnit]
  C* sums;                      // [segments, models, kUnit]

  template <class R>
  void run(const View<C>& view) const {
    constexpr int n = R::kModels == 2 ? 1 : R::kModels;
    const int models = view.models == 2 ? 1 : view.models;
    UnitRows<C, n> terms(terms_memory, models), lanes(lanes_memory, models);
    C* to = sums;
    set_rows(lanes, [](int, int) { return V{}; });
    SegmentEnds ends(view);
    for_each_unit<R>(view, [&](const R& rows, int64_t unit) {
      if (stored_gradient == nullptr) {
        __builtin_prefetch(gradient + unit + elements_ahead(rows));
      } else {
        __builtin_prefetch(stored_gradient + (unit + kChunk) * sizeof(C) / 2);
      }
      set_unit_terms(rows, unit, terms);
      if constexpr (R::kBlended) {
        ends.in_unit(view.begin + unit, [&](int64_t cut) {
          set_rows(lanes, [&](int t, int v) {
            return lanes.get(t, v) + math::join_lanes(terms.get(t, v), V{}, cut - v * kLanes<C>);
          });
          to = write(lanes, to);
          set_rows(lanes, [](int, int) { return V{}; });
          set_rows(terms, [&](int t, int v) { return math::join_lanes(V{}, terms.get(t, v), cut - v * kLanes<C>); });
        });
      }
      set_rows(lanes, [&](int t, int v) { return lanes.get(t, v) + terms.get(t, v); });
    });
    write(lanes, to);
  }

 private:
  template <class R, int N>
  TIMM_EXT_FN void set_unit_terms(const R& rows, int64_t unit, UnitRows<C, N>& terms) const {
    if (__builtin_expect(needs_no_scaling(rows, unit), 1)) {
      set_terms<Scaling::kNone>(rows, gradient, unit, terms);
      return;
    }
    UnitRows<C, 0> scaled(terms_memory, terms.models());
    set_scaled_terms(rows, gradient, unit, scaled);
    set_rows(terms, [&](int t, int v) { return scaled.get(t, v); });
  }

  template <int N>
  static TIMM_EXT_FN C* write(const UnitRows<C, N>& lanes, C* to) {
    for (int t = 0; t < lanes.models(); ++t) {
      for (int v = 0; v < kVectors<C>; ++v, to += kLanes<C>) math::store(to, lanes.get(t, v));
    }
    return to;
  }
};

/// Σ of the lanes of rows; a multiple of kSummedRows is read and written.
template <class C>
TIMM_EXT_FN void sum_lanes(const C* lanes, int64_t rows, double* sums) {
  for (int64_t row = 0; row < rows; row += math::kSummedRows) {
    const auto values = math::row_sums(lanes + row * kUnit);
    std::memcpy(sums + row, &values, sizeof(values));
  }
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
        terms_(in.models * kUnit),
        lanes_(in.models * kUnit),
        view_lanes_((in.models * kChunk + math::kSummedRows) * kUnit),
        view_sums_(in.models * kChunk + math::kSummedRows),
        sums_(in.models) {}

  void block_begins(int64_t begin) {
    block_ = begin;
    clear();
  }

  void view(const View<C>& view) {
    const C* const gradient = gradient_row<S>(gradient_, view, row_.get());
    const char* const stored = std::is_same_v<S, C> || gradient_.stride == 0
                                   ? nullptr
                                   : static_cast<const char*>(gradient_.values) + view.begin * sizeof(S);
    with_rows(view, SumUnits<C>{gradient, stored, terms_.get(), lanes_.get(), view_lanes_.get()});
    sum_lanes(view_lanes_.get(), view.segments * summed(view), view_sums_.get());
  }

  void piece(const View<C>& view, int64_t segment) {
    const double* const sums = view_sums_.get() + (segment - view.segment) * summed(view);
    if (view.models == 2) {
      sums_.get()[view.model(0)] += sums[0];
      sums_.get()[view.model(1)] -= sums[0];
      return;
    }
    for (int k = 0; k < view.models; ++k) sums_.get()[view.model(k)] += sums[k];
  }

  void whole_segments(const View<C>& view, int64_t first, int64_t last) {
    const double* const sums = view_sums_.get() + (first - view.segment) * summed(view);
    C* const rows = result_ + first * view.models;
    const int64_t count = (last - first) * summed(view);
    if (view.models == 2) {
      for (int64_t i = 0; i < count; ++i) rows[2 * i + 1] = -(rows[2 * i] = static_cast<C>(sums[i]));
      return;
    }
    for (int64_t i = 0; i < count; ++i) rows[i] = static_cast<C>(sums[i]);
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
  /// Models with sums of their own; of two the second one's are the first one's negatives.
  static int summed(const View<C>& view) { return view.models == 2 ? 1 : view.models; }

  void clear() {
    for (int64_t t = 0; t < in_.models; ++t) sums_.get()[t] = 0;
  }

  const MergeInputs& in_;
  const MergeGradient& gradient_;
  C* const result_;
  double* const edges_;
  int64_t block_ = 0;
  Buffer<C> row_;
  Buffer<C> terms_;
  Buffer<C> lanes_;
  Buffer<C> view_lanes_;
  Buffer<double> view_sums_;
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
