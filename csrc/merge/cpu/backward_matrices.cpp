// SPDX-License-Identifier: Apache-2.0
//
// Gradients of θ and F, a value per element and model.
#include "cpu/dispatch.h"
#include "merge/cpu/units.h"
#include "merge/cpu/walk.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

/// Writes the units' gradients to rows [models, kChunk]; null rows are not wanted.
template <class C>
struct MatrixUnits {
  const C* gradient;
  C* theta;
  C* fisher;

  template <class R>
  void run(const View<C>& view) const {
    for_each_unit<R>(view, [this](const R& rows, int64_t unit) {
      if (needs_no_scaling(rows, unit)) {
        write_unit<Scaling::kNone>(rows, unit);
      } else {
        write_unit<Scaling::kFull>(rows, unit);
      }
    });
  }

 private:
  template <Scaling How, class R>
  TIMM_EXT_FN void write_unit(const R& rows, int64_t unit) const {
    using V = typename math::VectorOf<C>::type;
    for (int v = 0; v < kVectors<C>; ++v) {
      const auto element = element_of(rows, unit, v);
      const auto m = math::merge<V, How>(element, element.models());
      const V g = math::load<V>(gradient + element.i);
      for (int t = 0; t < element.models(); ++t) {
        if (theta != nullptr) math::store(theta + t * kChunk + element.i, g * math::merge_share(element, m, t));
        if constexpr (R::kWeighted) {
          if (fisher != nullptr)
            math::store(fisher + t * kChunk + element.i, g * math::merge_fisher_slope(element, m, t));
        }
      }
    }
  }
};

template <class S, class C>
class MatricesVisitor {
 public:
  MatricesVisitor(const MergeInputs& in, const MergeGradient& gradient, const MergeMatrixGradients& out)
      : gradient_(gradient),
        out_(out),
        models_(in.models),
        row_(kChunk),
        theta_(in.models * kChunk),
        fisher_(in.models * kChunk) {}

  void block_begins(int64_t) {}

  void view(const View<C>& view) {
    C* const theta = out_.theta == nullptr ? nullptr : theta_.get();
    C* const fisher = out_.fisher == nullptr ? nullptr : fisher_.get();
    with_any_models(view, MatrixUnits<C>{gradient_row<S>(gradient_, view, row_.get()), theta, fisher});
    write_matrix(out_.theta, out_.theta_stride, view, theta);
    write_matrix(out_.fisher, out_.fisher_stride, view, fisher);
  }

  void piece(const View<C>&, int64_t) {}
  void whole_segments(const View<C>&, int64_t, int64_t) {}
  void segment_ends(int64_t, bool) {}

 private:
  /// Brings rows to a matrix; models without weight get 0.
  void write_matrix(void* matrix, int64_t stride, const View<C>& view, const C* rows) const {
    if (matrix == nullptr) return;
    int k = 0;
    for (int64_t t = 0; t < models_; ++t) {
      S* const to = static_cast<S*>(matrix) + t * stride + view.begin;
      if (k < view.models && view.model(k) == t) {
        narrow(to, rows + k++ * kChunk, view.count);
      } else {
        std::memset(to, 0, view.count * sizeof(S));
      }
    }
  }

  const MergeGradient& gradient_;
  const MergeMatrixGradients& out_;
  const int64_t models_;
  Buffer<C> row_;
  Buffer<C> theta_;
  Buffer<C> fisher_;
};

}  // namespace

void merge_backward_matrices(const MergeInputs& in, const MergeGradient& gradient, const MergeMatrixGradients& out,
                             int64_t first_block, int64_t last_block) {
  with_storage(in.element, [&](auto* s) {
    using S = Pointee<decltype(s)>;
    using C = Arithmetic<decltype(s)>;
    MatricesVisitor<S, C> visitor(in, gradient, out);
    Walk<S, C, decltype(visitor)>(in, visitor).blocks(first_block, last_block);
  });
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
