// SPDX-License-Identifier: Apache-2.0
//
// Forward and backward of the merge on the CPU. A block is cut into the pieces of its segments, a piece into chunks
// that stay in the first-level cache; the weights α_t of a segment are computed once per piece, and models whose weight
// is 0 there are left out.
#include "../math/merge.h"

#include <cstdlib>
#include <new>

#include "../math/exp.h"
#include "../math/tiles.h"
#include "kernels.h"
#include "storage.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

using math::Piece;

constexpr int64_t kChunk = 512;

/// Lanes of the gradient's accumulators. They belong to the result (element i of a chunk goes to lane i % kLanes), so
/// their number is that of the widest vectors, whatever the instruction set.
template <class C>
constexpr int64_t kLanes = 64 / sizeof(C);

/// Uninitialised memory for one call, without the standard library's templates: their code would be shared with files
/// compiled for another instruction set.
template <class C>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<C*>(std::malloc(count * sizeof(C) + 1))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  C* get() const { return data_; }

 private:
  C* data_;
};

/// Weights of a segment and its rows of θ and F in arithmetic type, for the models whose weight is not 0.
template <class C>
struct Rows {
  explicit Rows(int64_t models) : index(models), alpha(models), theta(models), fisher(models) {}

  int active = 0;
  Buffer<int64_t> index;
  Buffer<C> alpha;
  Buffer<const C*> theta;
  Buffer<const C*> fisher;
};

template <class C>
void set_weights(const MergeInputs& in, int64_t segment, Rows<C>& rows) {
  const C* const log_weight = static_cast<const C*>(in.log_weight) + segment * in.models;
  const double largest = math::row_maximum(log_weight, in.models);
  rows.active = 0;
  for (int64_t t = 0; t < in.models; ++t) {
    const C alpha = math::relative_weight<C>(log_weight[t], largest);
    if (alpha == 0) continue;
    rows.index.get()[rows.active] = t;
    rows.alpha.get()[rows.active++] = alpha;
  }
}

template <class S, class C>
void set_rows(const MergeInputs& in, int64_t begin, int64_t count, C* scratch, Rows<C>& rows) {
  for (int k = 0; k < rows.active; ++k) {
    const int64_t t = rows.index.get()[k];
    const S* const theta = static_cast<const S*>(in.theta) + t * in.theta_stride + begin;
    rows.theta.get()[k] = widen(theta, count, scratch + 2 * k * kChunk);
    if (in.fisher == nullptr) continue;
    const S* const fisher = static_cast<const S*>(in.fisher) + t * in.fisher_stride + begin;
    rows.fisher.get()[k] = widen(fisher, count, scratch + (2 * k + 1) * kChunk);
  }
}

/// The inputs of element (or vector of elements) i of the chunk; N models, or `active` of them where N is 0.
template <class V, class C, bool Weighted, int N>
struct ChunkElement {
  static constexpr bool kWeighted = Weighted;

  const Rows<C>& rows;
  int64_t i;

  TIMM_EXT_FN V theta(int t) const { return math::load<V>(rows.theta.get()[t] + i); }
  TIMM_EXT_FN V fisher(int t) const { return math::load<V>(rows.fisher.get()[t] + i); }
  TIMM_EXT_FN C alpha(int t) const { return rows.alpha.get()[t]; }
  TIMM_EXT_FN int models() const { return N > 0 ? N : rows.active; }
};

/// Calls body.template operator()<V>(i) for the chunk: whole vectors, then single elements.
template <class C, class Body>
TIMM_EXT_FN void for_each_vector(int64_t count, const Body& body) {
  using V = typename math::VectorOf<C>::type;
  constexpr int64_t width = sizeof(V) / sizeof(C);
  int64_t i = 0;
  for (; i + width <= count; i += width) body.template run<V>(i);
  for (; i < count; ++i) body.template run<C>(i);
}

template <class C, bool Weighted, int N>
struct Forward {
  const Rows<C>& rows;
  C* merged;

  template <class V>
  TIMM_EXT_FN void run(int64_t i) const {
    const ChunkElement<V, C, Weighted, N> element{rows, i};
    math::store(merged + i, math::merged_value(math::merge<V>(element, element.models())));
  }
};

/// Adds g (θ_t - θ*) w_t / Σw to lane i % kLanes of model t.
template <class C, bool Weighted, int N>
struct AddToLanes {
  const Rows<C>& rows;
  const C* gradient;
  C* lanes;  // [active, kLanes]

  template <class V>
  TIMM_EXT_FN void run(int64_t i) const {
    const ChunkElement<V, C, Weighted, N> element{rows, i};
    const math::Merge<V> m = math::merge<V>(element, element.models());
    const V g = math::load<V>(gradient + i);
    for (int t = 0; t < element.models(); ++t) {
      C* const lane = lanes + t * kLanes<C> + i % kLanes<C>;
      const V term = g * math::merge_offset(element, m, t) * math::merge_share(element, m, t);
      math::store(lane, math::load<V>(lane) + term);
    }
  }
};

template <class C, bool Weighted>
struct PlaneRows {
  const Rows<C>& rows;
  const C* gradient;
  C* theta;   // [active, kChunk], or null
  C* fisher;  // [active, kChunk], or null

  template <class V>
  TIMM_EXT_FN void run(int64_t i) const {
    const ChunkElement<V, C, Weighted, 0> element{rows, i};
    const math::Merge<V> m = math::merge<V>(element, element.models());
    const V g = math::load<V>(gradient + i);
    for (int t = 0; t < element.models(); ++t) {
      if (theta != nullptr) math::store(theta + t * kChunk + i, g * math::merge_share(element, m, t));
      if constexpr (Weighted) {
        if (fisher != nullptr) math::store(fisher + t * kChunk + i, g * math::merge_fisher_slope(element, m, t));
      }
    }
  }
};

/// Runs Body<C, Weighted, N> on a chunk, with N a constant for the usual numbers of models.
template <template <class, bool, int> class Body, bool Weighted, class C, class... Members>
void run_chunk(int64_t count, const Rows<C>& rows, Members... members) {
  if constexpr (sizeof(C) == sizeof(float)) {
    switch (rows.active) {
      case 2:
        return for_each_vector<C>(count, Body<C, Weighted, 2>{rows, members...});
      case 3:
        return for_each_vector<C>(count, Body<C, Weighted, 3>{rows, members...});
      case 4:
        return for_each_vector<C>(count, Body<C, Weighted, 4>{rows, members...});
      case 5:
        return for_each_vector<C>(count, Body<C, Weighted, 5>{rows, members...});
    }
  }
  for_each_vector<C>(count, Body<C, Weighted, 0>{rows, members...});
}

/// Calls f(piece) for the pieces of the blocks, with the segment's weights set.
template <class C, class F>
void for_each_weighed_piece(const MergeInputs& in, int64_t first_block, int64_t last_block, Rows<C>& rows, const F& f) {
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t begin = block * kBlock;
    const int64_t end = begin + kBlock < in.elements ? begin + kBlock : in.elements;
    math::for_each_piece(in.offsets, in.segments, begin, end, [&](const Piece& piece) {
      set_weights(in, piece.segment, rows);
      f(piece, begin);
    });
  }
}

/// Calls f(begin, count) for the chunks of a piece, with the rows set.
template <class S, class C, class F>
void for_each_chunk(const MergeInputs& in, const Piece& piece, C* scratch, Rows<C>& rows, const F& f) {
  for (int64_t begin = piece.begin; begin < piece.end; begin += kChunk) {
    const int64_t count = piece.end - begin < kChunk ? piece.end - begin : kChunk;
    set_rows<S>(in, begin, count, scratch, rows);
    f(begin, count);
  }
}

/// The incoming gradient of a chunk in arithmetic type.
template <class S, class C>
const C* gradient_row(const MergeGradient& gradient, int64_t begin, int64_t count, C* scratch) {
  const S* const values = static_cast<const S*>(gradient.values);
  if (gradient.stride != 0) return widen(values + begin, count, scratch);
  C one;
  const C value = *widen(values, 1, &one);
  for (int64_t i = 0; i < count; ++i) scratch[i] = value;
  return scratch;
}

template <class S, class C = typename ArithmeticOf<S>::type>
void forward(const MergeInputs& in, void* merged, int64_t first_block, int64_t last_block) {
  Rows<C> rows(in.models);
  const Buffer<C> scratch((2 * in.models + 1) * kChunk);
  C* const result = scratch.get() + 2 * in.models * kChunk;
  for_each_weighed_piece(in, first_block, last_block, rows, [&](const Piece& piece, int64_t) {
    for_each_chunk<S>(in, piece, scratch.get(), rows, [&](int64_t begin, int64_t count) {
      S* const to = static_cast<S*>(merged) + begin;
      C* const row = result_row(to, result);
      if (in.fisher != nullptr) {
        run_chunk<Forward, true>(count, rows, row);
      } else {
        run_chunk<Forward, false>(count, rows, row);
      }
      narrow(to, count, row);
    });
  });
}

/// Σ of the lanes in float64, pairwise.
template <class C>
double lane_sum(const C* lanes) {
  double sums[kLanes<C> / 2];
  for (int64_t i = 0; i < kLanes<C> / 2; ++i) sums[i] = double(lanes[i]) + double(lanes[i + kLanes<C> / 2]);
  for (int64_t half = kLanes<C> / 4; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

/// sums[t] = Σ over the piece; lanes of arithmetic type per chunk, added up in float64.
template <class S, class C>
void sum_piece(const MergeInputs& in, const MergeGradient& gradient, const Piece& piece, C* scratch, C* lanes,
               Rows<C>& rows, double* sums) {
  for (int k = 0; k < rows.active; ++k) sums[k] = 0;
  for_each_chunk<S>(in, piece, scratch, rows, [&](int64_t begin, int64_t count) {
    const C* const g = gradient_row<S>(gradient, begin, count, scratch + 2 * in.models * kChunk);
    for (int64_t i = 0; i < rows.active * kLanes<C>; ++i) lanes[i] = 0;
    if (in.fisher != nullptr) {
      run_chunk<AddToLanes, true>(count, rows, g, lanes);
    } else {
      run_chunk<AddToLanes, false>(count, rows, g, lanes);
    }
    for (int k = 0; k < rows.active; ++k) sums[k] += lane_sum(lanes + k * kLanes<C>);
  });
}

template <class S, class C = typename ArithmeticOf<S>::type>
void backward_log_weight(const MergeInputs& in, const MergeGradient& gradient, void* grad_log_weight, double* edges,
                         int64_t first_block, int64_t last_block) {
  Rows<C> rows(in.models);
  const Buffer<C> scratch((2 * in.models + 1) * kChunk);
  const Buffer<C> lanes(in.models * kLanes<C>);
  const Buffer<double> sums(in.models);
  for_each_weighed_piece(in, first_block, last_block, rows, [&](const Piece& piece, int64_t block_begin) {
    sum_piece<S>(in, gradient, piece, scratch.get(), lanes.get(), rows, sums.get());
    C* const row = static_cast<C*>(grad_log_weight) + piece.segment * in.models;
    const bool enters = in.offsets[piece.segment] > block_begin;
    double* const edge = edges + (block_begin / kBlock * 2 + enters) * in.models;
    int k = 0;
    for (int64_t t = 0; t < in.models; ++t) {
      const bool active = k < rows.active && rows.index.get()[k] == t;
      const double sum = active ? sums.get()[k] : 0.0;
      k += active;
      if (piece.cut) {
        edge[t] = sum;
      } else {
        row[t] = static_cast<C>(sum);
      }
    }
  });
}

/// Brings the chunk's rows to a gradient plane; models without weight get 0.
template <class S, class C>
void write_plane(void* plane, int64_t stride, int64_t begin, int64_t count, int64_t models, const Rows<C>& rows,
                 const C* results) {
  if (plane == nullptr) return;
  int k = 0;
  for (int64_t t = 0; t < models; ++t) {
    S* const to = static_cast<S*>(plane) + t * stride + begin;
    const bool active = k < rows.active && rows.index.get()[k] == t;
    const C* const from = results + k * kChunk;
    for (int64_t i = 0; i < count; ++i) {
      const C value = active ? from[i] : C(0);
      if constexpr (std::is_same_v<S, C>) {
        to[i] = value;
      } else {
        from_float(to[i], value);
      }
    }
    k += active;
  }
}

template <class S, class C = typename ArithmeticOf<S>::type>
void backward_planes(const MergeInputs& in, const MergeGradient& gradient, const MergePlaneGradients& out,
                     int64_t first_block, int64_t last_block) {
  Rows<C> rows(in.models);
  const Buffer<C> scratch((4 * in.models + 1) * kChunk);
  C* const g_scratch = scratch.get() + 2 * in.models * kChunk;
  C* const theta = out.theta == nullptr ? nullptr : g_scratch + kChunk;
  C* const fisher = out.fisher == nullptr ? nullptr : g_scratch + (in.models + 1) * kChunk;
  for_each_weighed_piece(in, first_block, last_block, rows, [&](const Piece& piece, int64_t) {
    for_each_chunk<S>(in, piece, scratch.get(), rows, [&](int64_t begin, int64_t count) {
      const C* const g = gradient_row<S>(gradient, begin, count, g_scratch);
      if (in.fisher != nullptr) {
        for_each_vector<C>(count, PlaneRows<C, true>{rows, g, theta, fisher});
      } else {
        for_each_vector<C>(count, PlaneRows<C, false>{rows, g, theta, fisher});
      }
      write_plane<S>(out.theta, out.theta_stride, begin, count, in.models, rows, theta);
      write_plane<S>(out.fisher, out.fisher_stride, begin, count, in.models, rows, fisher);
    });
  });
}

/// Calls f with a null pointer of the storage type.
template <class F>
void with_storage(Element element, const F& f) {
  switch (element) {
    case Element::kFloat32:
      return f(static_cast<float*>(nullptr));
    case Element::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case Element::kFloat16:
      return f(static_cast<Float16*>(nullptr));
    case Element::kFloat64:
      return f(static_cast<double*>(nullptr));
  }
}

template <class Pointer>
using Pointee = std::remove_pointer_t<Pointer>;

}  // namespace

const MergeKernels merge_kernels = {
    [](const MergeInputs& in, void* merged, int64_t first, int64_t last) {
      with_storage(in.element, [&](auto* s) { forward<Pointee<decltype(s)>>(in, merged, first, last); });
    },
    [](const MergeInputs& in, const MergeGradient& gradient, void* out, double* edges, int64_t first, int64_t last) {
      with_storage(in.element,
                   [&](auto* s) { backward_log_weight<Pointee<decltype(s)>>(in, gradient, out, edges, first, last); });
    },
    [](const MergeInputs& in, const MergeGradient& gradient, const MergePlaneGradients& out, int64_t first,
       int64_t last) {
      with_storage(in.element, [&](auto* s) { backward_planes<Pointee<decltype(s)>>(in, gradient, out, first, last); });
    },
};

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
