// SPDX-License-Identifier: Apache-2.0
//
// The lanes of vectors are columns of the output. Rows are taken in pairs of planes × pairs of rows: the forms of their
// inputs are made once, in the second-level cache, and met by all outputs. Compiled with fused multiply-add where there
// is one: the bits hang on the instruction set, but not on the number of threads.
#include <cstring>

#include "../math/simd.h"
#include "buffer.h"
#include "kernels.h"
#include "winograd.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

using V = math::FloatV;
constexpr int64_t kLanes = sizeof(V) / sizeof(float);
constexpr int64_t kChain = 16;  // channels of the input that are summed by themselves: long chains round more
constexpr int kOutputs = math::kVectorBytes == 64 ? 8 : 4;  // for which, times two vectors, there are registers

TIMM_EXT_FN int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
TIMM_EXT_FN int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }

/// Of four inputs, the factors of the four products.
template <class C>
TIMM_EXT_FN void input_forms(const C& x0, const C& x1, const C& x2, const C& x3, C& t0, C& t1, C& t2, C& t3) {
  t0 = x0 - x2;
  t1 = x1 + x2;
  t2 = x2 - x1;
  t3 = x1 - x3;
}

/// Where a vector of the output lies.
struct Place {
  int64_t pair;    // of rows, among those of a group
  int64_t column;  // the first
};

/// One pair of planes of one example.
class Planes {
 public:
  Planes(const WinogradProblem& p, float* memory)
      : s_(*p.shape),
        p_(p),
        row_vectors_((s_.out[2] + kLanes - 1) / kLanes),
        pairs_(row_vectors_ == 1 ? 2 : 1),
        pitch_(larger_of(s_.out[2], kLanes) + s_.kernel[2] - 1),
        zeros_(memory),
        forms_(memory + zeros(s_)) {}

  static int64_t elements(const ConvShape& s) {
    return zeros(s) + kForms2 * s.inputs * 2 * (larger_of(s.out[2], kLanes) + s.kernel[2] - 1);
  }

  void run(int64_t unit) {
    const int64_t pairs_of_planes = (s_.out[0] + 1) / 2, plane = unit % pairs_of_planes * 2;
    const int64_t example = unit / pairs_of_planes;
    const float* const input = p_.input + example * s_.inputs * s_.in[0] * s_.in[1] * s_.in[2];
    float* const output = p_.output + example * s_.outputs * s_.out[0] * s_.out[1] * s_.out[2];
    for (int64_t row = 0; row < s_.out[1]; row += 2 * pairs_) {
      for (int64_t i = 0; i < s_.inputs; ++i) {
        for (int64_t pair = 0; pair < pairs_; ++pair) write_forms(input, i, plane, row, pair);
      }
      for (int64_t first = 0; first < s_.outputs; first += kOutputs) write_outputs(first, plane, row, output);
    }
  }

 private:
  static int64_t zeros(const ConvShape& s) { return (s.in[2] + kLanes - 1) / kLanes * kLanes; }

  float* form_row(int64_t form, int64_t input, int64_t pair) const {
    return forms_ + ((form * s_.inputs + input) * pairs_ + pair) * pitch_;
  }

  /// A row of the input, or null where there is none.
  const float* input_row(const float* input, int64_t channel, int64_t plane, int64_t row) const {
    const int64_t d = plane - s_.padding[0], h = row - s_.padding[1];
    const bool there = d >= 0 && d < s_.in[0] && h >= 0 && h < s_.in[1];
    return there ? input + ((channel * s_.in[0] + d) * s_.in[1] + h) * s_.in[2] : nullptr;
  }

  void write_forms(const float* input, int64_t channel, int64_t plane, int64_t row, int64_t pair) const {
    const float* rows[4][4];
    const int64_t next = channel + 1 < s_.inputs ? s_.in[0] * s_.in[1] * s_.in[2] : 0;
    for (int64_t d = 0; d < 4; ++d) {
      for (int64_t h = 0; h < 4; ++h) {
        const float* const from = input_row(input, channel, plane + d, row + 2 * pair + h);
        rows[d][h] = from != nullptr ? from : zeros_;
        for (int64_t w = 0; w < s_.in[2] && from != nullptr && next != 0; w += 16) __builtin_prefetch(from + next + w);
      }
    }
    float* const to = form_row(0, channel, pair) + s_.padding[2];
    const int64_t form = form_row(1, channel, pair) - form_row(0, channel, pair);
    if (s_.in[2] < kLanes) {
      for (int64_t w = 0; w < s_.in[2]; ++w) write_forms_at<float>(rows, w, to + w, form);
      return;
    }
    for (int64_t w = 0; w < s_.in[2]; w += kLanes) {
      const int64_t at = smaller_of(w, s_.in[2] - kLanes);
      write_forms_at<V>(rows, at, to + at, form);
    }
  }

  template <class C>
  static void write_forms_at(const float* const (&rows)[4][4], int64_t w, float* to, int64_t form) {
    C x[4][4], t[4][4];
    for (int d = 0; d < 4; ++d) {
      for (int h = 0; h < 4; ++h) x[d][h] = math::load<C>(rows[d][h] + w);
      input_forms(x[d][0], x[d][1], x[d][2], x[d][3], t[d][0], t[d][1], t[d][2], t[d][3]);
    }
    for (int h = 0; h < 4; ++h) {
      C f[4];
      input_forms(t[0][h], t[1][h], t[2][h], t[3][h], f[0], f[1], f[2], f[3]);
      for (int d = 0; d < 4; ++d) math::store(to + (4 * d + h) * form, f[d]);
    }
  }

  void write_outputs(int64_t first, int64_t plane, int64_t row, float* output) const {
    const int64_t count = row_vectors_ * pairs_;
    for (int64_t v = 0; v < count; v += 2) {
      if (v + 1 < count) {
        const Place places[2] = {place(v), place(v + 1)};
        write_block<2>(places, first, plane, row, output);
      } else {
        const Place places[1] = {place(v)};
        write_block<1>(places, first, plane, row, output);
      }
    }
  }

  Place place(int64_t v) const {
    return {v / row_vectors_, larger_of(0, smaller_of(v % row_vectors_ * kLanes, s_.out[2] - kLanes))};
  }

  /// Some vectors of four rows of a block of outputs.
  template <int Vectors>
  void write_block(const Place (&places)[Vectors], int64_t first, int64_t plane, int64_t row, float* output) const {
    V products[kForms2][kOutputs][Vectors];
    const float* weights = p_.forms + first / kWinogradOutputs * winograd_block_elements(s_) + first % kWinogradOutputs;
    for (int64_t form = 0; form < kForms2; ++form) {
      for (int64_t i = 0; i < s_.inputs; i += kChain) {
        const float* x[Vectors];
        for (int v = 0; v < Vectors; ++v) x[v] = form_row(form, i, places[v].pair) + places[v].column;
        V sums[kOutputs][Vectors] = {};
        weights = add_products(weights, smaller_of(kChain, s_.inputs - i), x, sums);
        for (int o = 0; o < kOutputs; ++o) {
          for (int v = 0; v < Vectors; ++v)
            products[form][o][v] = i == 0 ? sums[o][v] : products[form][o][v] + sums[o][v];
        }
      }
    }
    const int64_t outputs = smaller_of(kOutputs, s_.outputs - first);
    for (int64_t o = 0; o < outputs; ++o) {
      const V bias = p_.bias != nullptr ? math::broadcast(p_.bias + first + o) : V{};
      for (int v = 0; v < Vectors; ++v) {
        V four[2][2];
        combine([&](int form) { return products[form][o][v]; }, bias, four);
        write_four(four, output, first + o, plane, row + 2 * places[v].pair, places[v].column);
      }
    }
  }

  /// sums += weights · inputs of some channels; returns where the next ones' weights are.
  template <int Vectors>
  const float* add_products(const float* weights, int64_t inputs, const float* (&x)[Vectors],
                            V (&sums)[kOutputs][Vectors]) const {
    for (int64_t i = 0; i < inputs; ++i) {
      for (int64_t w = 0; w < s_.kernel[2]; ++w, weights += kWinogradOutputs) {
        V factors[Vectors];
        for (int v = 0; v < Vectors; ++v) factors[v] = math::load<V>(x[v] + w);
        for (int o = 0; o < kOutputs; ++o) {
          const V weight = math::broadcast(weights + o);
          for (int v = 0; v < Vectors; ++v) sums[o][v] += weight * factors[v];
        }
      }
      for (int v = 0; v < Vectors; ++v) x[v] += pairs_ * pitch_;
    }
    return weights;
  }

  /// The outputs of two planes × two rows from the products of all forms.
  template <class Product>
  static TIMM_EXT_FN void combine(const Product& product, V bias, V (&to)[2][2]) {
    V y[2][4];
    for (int h = 0; h < 4; ++h) {
      const V m0 = product(h), m1 = product(4 + h), m2 = product(8 + h), m3 = product(12 + h);
      y[0][h] = m0 + m1 + m2;
      y[1][h] = m1 - m2 - m3;
    }
    for (int d = 0; d < 2; ++d) {
      to[d][0] = y[d][0] + y[d][1] + y[d][2] + bias;
      to[d][1] = y[d][1] - y[d][2] - y[d][3] + bias;
    }
  }

  void write_four(const V (&four)[2][2], float* output, int64_t channel, int64_t plane, int64_t row,
                  int64_t column) const {
    for (int64_t d = 0; d < 2 && plane + d < s_.out[0]; ++d) {
      for (int64_t h = 0; h < 2 && row + h < s_.out[1]; ++h) {
        float* const to = output + ((channel * s_.out[0] + plane + d) * s_.out[1] + row + h) * s_.out[2] + column;
        if (s_.out[2] >= kLanes) {
          math::store(to, four[d][h]);
        } else {
          std::memcpy(to, &four[d][h], s_.out[2] * sizeof(float));
        }
      }
    }
  }

  const ConvShape& s_;
  const WinogradProblem& p_;
  int64_t row_vectors_;
  int64_t pairs_;  // of rows whose forms are made at a time: two vectors, if there are
  int64_t pitch_;
  const float* zeros_;  // a row of the input
  float* forms_;        // [16, inputs, pairs, pitch], zero where the padding is
};

}  // namespace

void winograd_conv(const WinogradProblem& p, int64_t first_unit, int64_t last_unit) {
  const int64_t elements = Planes::elements(*p.shape);
  const Buffer<float> memory(elements);
  std::memset(memory.get(), 0, elements * sizeof(float));
  Planes planes(p, memory.get());
  for (int64_t unit = first_unit; unit < last_unit; ++unit) planes.run(unit);
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
