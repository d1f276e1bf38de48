// SPDX-License-Identifier: Apache-2.0
#include "cpu/dispatch.h"
#include "merge/cpu/units.h"
#include "merge/cpu/walk.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

/// Merges the units of a view into `to`.
template <class C>
struct MergeUnits {
  C* to;
  bool streamed;  // `to` is aligned to vectors and not read soon

  template <class R>
  void run(const View<C>& view) const {
    for_each_unit<R>(view, [this](const R& rows, int64_t unit) {
      if (__builtin_expect(needs_no_scaling(rows, unit), 1)) {
        merge_unit<Scaling::kNone>(rows, unit);
      } else {
        merge_scaled(rows, unit);
      }
    });
  }

 private:
  /// Out of line: the registers of the loop around it stay its own.
  template <class R>
  __attribute__((noinline)) void merge_scaled(const R& rows, int64_t unit) const {
    merge_unit<Scaling::kFull>(rows, unit);
  }

  template <Scaling How, class R>
  TIMM_EXT_FN void merge_unit(const R& rows, int64_t unit) const {
    using V = typename math::VectorOf<C>::type;
    V merged[kVectors<C>];
    for (int v = 0; v < kVectors<C>; ++v) {
      const auto element = element_of(rows, unit, v);
      merged[v] = math::merged_value(math::merge<V, How>(element, element.models()));
    }
    for (int v = 0; v < kVectors<C>; ++v) {
      C* const at = to + unit + v * kLanes<C>;
      streamed ? math::stream(at, merged[v]) : math::store(at, merged[v]);
    }
  }
};

template <class S, class C>
struct ForwardVisitor {
  S* merged;
  bool streamed;
  Buffer<C> scratch{kChunk};
  Buffer<S> narrowed{kChunk};

  void block_begins(int64_t) {}

  void view(const View<C>& view) {
    S* const to = merged + view.begin;
    if constexpr (std::is_same_v<S, C>) {
      if (view.count % kUnit == 0) {
        return with_rows(view, MergeUnits<C>{to, streamed && is_aligned(to)});
      }
    }
    with_rows(view, MergeUnits<C>{scratch.get(), false});
    if (streamed && view.count == kChunk && is_aligned(to)) {
      narrow(narrowed.get(), scratch.get(), kChunk);
      stream_chunk(to);
    } else {
      narrow(to, scratch.get(), view.count);
    }
  }

  void stream_chunk(S* to) const {
    using V = math::FloatV;
    constexpr int64_t lanes = sizeof(V) / sizeof(float);
    float* const words = reinterpret_cast<float*>(to);
    const float* const from = reinterpret_cast<const float*>(narrowed.get());
    for (int64_t i = 0; i < kChunk * int64_t{sizeof(S)} / int64_t{sizeof(float)}; i += lanes) {
      math::stream(words + i, math::load<V>(from + i));
    }
  }

  static bool is_aligned(const S* to) { return reinterpret_cast<uintptr_t>(to) % math::kVectorBytes == 0; }

  void piece(const View<C>&, int64_t) {}
  void whole_segments(const View<C>&, int64_t, int64_t) {}
  void segment_ends(int64_t, bool) {}
};

}  // namespace

void merge_forward(const MergeInputs& in, void* merged, bool streamed, int64_t first_block, int64_t last_block) {
  with_storage(in.element, [&](auto* s) {
    using S = Pointee<decltype(s)>;
    using C = Arithmetic<decltype(s)>;
    ForwardVisitor<S, C> visitor{static_cast<S*>(merged), streamed};
    Walk<S, C, decltype(visitor)>(in, visitor).blocks(first_block, last_block);
  });
  if (streamed) math::end_stream();
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
