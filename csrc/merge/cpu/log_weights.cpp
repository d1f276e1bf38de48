// SPDX-License-Identifier: Apache-2.0
//
// Log-weights of mixing logits, each row shifted so that its largest is 0, and their gradient.
#include "cpu/buffer.h"
#include "cpu/dispatch.h"
#include "math/exp.h"
#include "math/shuffle.h"
#include "merge/cpu/kernels.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

using V = math::DoubleV;
constexpr int64_t kLanes = sizeof(V) / sizeof(double);
constexpr int64_t kChunk = 512;

template <class C>
TIMM_EXT_FN V log_weight(Mixing mixing, V x) {
  if (mixing == Mixing::kSoftmax) return x;
  return mixing == Mixing::kSigmoid ? math::log_sigmoid<math::kExpTerms<C>, math::kLogTerms<C>>(x)
                                    : math::log_positive<math::kLogTerms<C>>(x);
}

template <class C>
TIMM_EXT_FN V slope(Mixing mixing, V x) {
  if (mixing == Mixing::kSoftmax) return V{} + 1.0;
  if (mixing == Mixing::kSigmoid) return math::sigmoid<math::kExpTerms<C>>(-x);
  return math::select(x == 0.0, V{}, 1.0 / x);
}

/// Calls f(first, count, values) for chunks of rows, with room for their values and a vector more.
template <class F>
void for_each_chunk(int64_t models, int64_t first_row, int64_t last_row, const F& f) {
  const int64_t rows = models < kChunk ? kChunk / models : 1;
  const Buffer<double> values(rows * models + kLanes);
  for (int64_t row = first_row; row < last_row; row += rows) {
    f(row, last_row - row < rows ? last_row - row : rows, values.get());
  }
}

/// values[i] = f(x[i]), a vector at a time.
template <class C, class F>
TIMM_EXT_FN void map(const C* x, int64_t count, double* values, const F& f) {
  for (int64_t i = 0; i < count; ++i) values[i] = x[i];
  for (int64_t i = count; i < count + kLanes; ++i) values[i] = 1.0;
  for (int64_t i = 0; i < count; i += kLanes) math::store(values + i, f(math::load<V>(values + i)));
}

/// Subtracts each row's largest; N models, or `count` where N is 0.
template <int N, class C>
void shift_rows_of(const double* values, int64_t rows, int64_t count, C* out) {
  const int64_t models = N > 0 ? N : count;
  for (int64_t row = 0; row < rows; ++row) {
    const double* const from = values + row * models;
    double largest = from[0];
    bool ordered = from[0] == from[0];
    for (int64_t t = 1; t < models; ++t) {
      largest = from[t] > largest ? from[t] : largest;
      ordered &= from[t] == from[t];
    }
    if (!ordered) largest = math::kInfinity - math::kInfinity;
    for (int64_t t = 0; t < models; ++t) out[row * models + t] = static_cast<C>(from[t] - largest);
  }
}

template <class C>
void shift_rows(const double* values, int64_t rows, int64_t models, C* out) {
  switch (models) {
    case 2:
      return shift_rows_of<2>(values, rows, models, out);
    case 3:
      return shift_rows_of<3>(values, rows, models, out);
    case 4:
      return shift_rows_of<4>(values, rows, models, out);
    case 5:
      return shift_rows_of<5>(values, rows, models, out);
    default:
      return shift_rows_of<0>(values, rows, models, out);
  }
}

/// The largest entry's own gradient takes what the shift passes on to it, -Σ grad; the first of equals.
template <int N, class C>
void backward_rows_of(const C* grad, const C* x, const double* slopes, int64_t rows, int64_t count, C* out) {
  const int64_t models = N > 0 ? N : count;
  for (int64_t i = 0; i < rows * models; ++i) out[i] = static_cast<C>(grad[i] * slopes[i]);
  for (int64_t begin = 0; begin < rows * models; begin += models) {
    double sum = 0.0;
    C largest = x[begin];
    int64_t at = begin;
    for (int64_t i = begin; i < begin + models; ++i) {
      sum += grad[i];
      const bool more = x[i] > largest;  // every mixing is increasing
      at += (i - at) & -int64_t{more};   // not a jump, which would be mispredicted
      largest = more ? x[i] : largest;
    }
    out[at] = static_cast<C>((grad[at] - sum) * slopes[at]);
  }
}

template <class C>
void backward_rows(const C* grad, const C* x, const double* slopes, int64_t rows, int64_t models, C* out) {
  switch (models) {
    case 3:
      return backward_rows_of<3>(grad, x, slopes, rows, models, out);
    case 4:
      return backward_rows_of<4>(grad, x, slopes, rows, models, out);
    case 5:
      return backward_rows_of<5>(grad, x, slopes, rows, models, out);
    default:
      return backward_rows_of<0>(grad, x, slopes, rows, models, out);
  }
}

/// The same for rows of two, a vector of them at a time.
template <class C>
TIMM_EXT_FN void backward_pairs(const C* grad, const C* x, const double* slopes, int64_t rows, C* out) {
  int64_t i = 0;
  for (; i + kLanes <= 2 * rows; i += kLanes) {
    const V logits = math::load_doubles(x + i), other = math::swap_pairs(logits);
    const V g = math::load_doubles(grad + i);
    V first;
    for (int64_t lane = 0; lane < kLanes; ++lane) first[lane] = 1.0 - lane % 2;
    const V largest = math::select(logits > other, V{} + 1.0, math::select(other > logits, V{}, first));
    math::store_as(out + i, (g - largest * (g + math::swap_pairs(g))) * math::load<V>(slopes + i));
  }
  backward_rows(grad + i, x + i, slopes + i, rows - i / 2, 2, out + i);
}

}  // namespace

void log_weights(Mixing mixing, Element element, const void* logits, void* out, int64_t models, int64_t first_row,
                 int64_t last_row) {
  with_storage(element, [&](auto* s) {
    using C = Arithmetic<decltype(s)>;
    for_each_chunk(models, first_row, last_row, [&](int64_t row, int64_t rows, double* values) {
      const C* const x = static_cast<const C*>(logits) + row * models;
      C* const to = static_cast<C*>(out) + row * models;
      map(x, rows * models, values, [&](V value) { return log_weight<C>(mixing, value); });
      shift_rows(values, rows, models, to);
    });
  });
}

void log_weights_backward(Mixing mixing, Element element, const void* grad, const void* logits, void* out,
                          int64_t models, int64_t first_row, int64_t last_row) {
  with_storage(element, [&](auto* s) {
    using C = Arithmetic<decltype(s)>;
    for_each_chunk(models, first_row, last_row, [&](int64_t row, int64_t rows, double* values) {
      const C* const g = static_cast<const C*>(grad) + row * models;
      const C* const x = static_cast<const C*>(logits) + row * models;
      C* const to = static_cast<C*>(out) + row * models;
      map(x, rows * models, values, [&](V value) { return slope<C>(mixing, value); });
      models == 2 ? backward_pairs(g, x, values, rows, to) : backward_rows(g, x, values, rows, models, to);
    });
  });
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
