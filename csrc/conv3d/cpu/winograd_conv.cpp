// SPDX-License-Identifier: Apache-2.0
//
// The lanes of vectors are columns of the output. Rows are taken in pairs of planes × pairs of rows, whose inputs'
// forms are made once and met by all outputs. Compiled with fused multiply-add where there is one: the bits hang on the
// instruction set, but not on the number of threads.
#include <cstring>

#include "conv3d/cpu/kernels.h"
#include "conv3d/cpu/tile.h"
#include "conv3d/cpu/winograd_forms.h"
#include "cpu/buffer.h"
#include "math/shuffle.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int64_t kChain = 16;  // channels of the input that are summed by themselves: long chains round more
constexpr int kOutputs = kTileOutputs;

/// Where a vector of the output lies.
struct Place {
  int64_t pair;    // of rows, the first, among those of a tile
  int64_t column;  // the first
};

/// Some rows of two planes of the output of one example.
class Planes {
 public:
  Planes(const WinogradProblem& p, float* memory)
      : s_(*p.shape),
        p_(p),
        tile_(s_),
        row_groups_(winograd_row_groups(s_)),
        plane_pairs_((s_.out[0] + 1) / 2),
        channel_(s_.out[0] * s_.out[1] * s_.out[2]),
        forms_(s_, tile_, memory) {}

  void write(int64_t unit) const {
    const int64_t first = unit % row_groups_ * kWinogradRows, last = smaller_of(first + kWinogradRows, s_.out[1]);
    const int64_t plane = unit / row_groups_ % plane_pairs_ * 2, example = unit / row_groups_ / plane_pairs_;
    const float* const input = p_.input + example * s_.inputs * s_.in[0] * s_.in[1] * s_.in[2];
    float* const output = p_.output + example * s_.outputs * channel_;
    for (int64_t row = first; row < last; row += 2 * tile_.pairs) {
      forms_.make(input, plane, row);
      for (int64_t o = 0; o < s_.outputs; o += kOutputs) write_rows(o, plane, row, output);
    }
  }

 private:
  /// All rows of a tile of some outputs.
  void write_rows(int64_t first, int64_t plane, int64_t row, float* output) const {
    const int64_t count = tile_.row_vectors * tile_.pairs / tile_.vector_rows;
    for (int64_t v = 0; v < count; v += 2) {
      if (v + 1 == count) {
        write_vectors<1, false>({place(v)}, first, plane, row, output);
      } else if (tile_.vector_rows == 2) {
        write_vectors<2, true>({place(v), place(v + 1)}, first, plane, row, output);
      } else {
        write_vectors<2, false>({place(v), place(v + 1)}, first, plane, row, output);
      }
    }
  }

  Place place(int64_t v) const {
    const int64_t column = smaller_of(v % tile_.row_vectors * kLanes, s_.out[2] - kLanes);
    return {v / tile_.row_vectors * tile_.vector_rows, larger_of(0, column)};
  }

  template <int Vectors, bool Halves>
  void write_vectors(const Place (&places)[Vectors], int64_t first, int64_t plane, int64_t row, float* output) const {
    V products[kWinogradForms][kOutputs][Vectors];
    const float* weights = p_.forms + first / kWinogradOutputs * winograd_block_elements(s_) + first % kWinogradOutputs;
    const float* x[Vectors];  // from form to form
    for (int v = 0; v < Vectors; ++v) x[v] = forms_.row(0, 0, places[v].pair) + places[v].column;
    for (int64_t form = 0; form < kWinogradForms; ++form) {
      for (int64_t i = 0; i < s_.inputs; i += kChain) {
        V sums[kOutputs][Vectors] = {};
        const int64_t inputs = smaller_of(kChain, s_.inputs - i);
        weights = s_.kernel[2] == 3 ? add_channels<Halves, 3>(weights, inputs, x, sums)
                                    : add_channels<Halves, 0>(weights, inputs, x, sums);
        for (int o = 0; o < kOutputs; ++o) {
          for (int v = 0; v < Vectors; ++v) {
            products[form][o][v] = i == 0 ? sums[o][v] : products[form][o][v] + sums[o][v];
          }
        }
      }
    }
    const int64_t outputs = smaller_of(kOutputs, s_.outputs - first);
    for (int v = 0; v < Vectors; ++v) {
      const int64_t first_row = row + 2 * places[v].pair;
      for (int64_t o = 0; o < outputs; ++o) {
        const auto product = [&](int form) { return products[form][o][v]; };
        float* const to = output + (first + o) * channel_;
        const V bias = p_.bias != nullptr ? math::broadcast(p_.bias + first + o) : V{};
        V four[2][2];
        combine(product, bias, four);
        write_four(four, to + (plane * s_.out[1] + first_row) * s_.out[2] + places[v].column, plane, first_row);
      }
    }
  }

  /// sums += weights · inputs of some channels; returns where the next ones' weights are.
  template <bool Halves, int Columns, int Vectors>
  const float* add_channels(const float* weights, int64_t inputs, const float* (&x)[Vectors],
                            V (&sums)[kOutputs][Vectors]) const {
    const int64_t columns = Columns > 0 ? Columns : s_.kernel[2];
    for (int64_t i = 0; i < inputs; ++i, weights += columns * kWinogradOutputs) {
      add_products(
          columns, [&](int64_t w, int o) { return math::broadcast(weights + w * kWinogradOutputs + o); },
          [&](int64_t w, int v) {
            return Halves ? math::load_halves(x[v] + w, x[v] + tile_.pitch + w) : math::load<V>(x[v] + w);
          },
          sums);
      for (int v = 0; v < Vectors; ++v) x[v] += tile_.pairs * tile_.pitch;
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

  void write_four(const V (&four)[2][2], float* to, int64_t plane, int64_t row) const {
    for (int64_t d = 0; d < 2 && plane + d < s_.out[0]; ++d) {
      for (int64_t h = 0; h < 2 && row + h < s_.out[1]; ++h) {
        float* const at = to + (d * s_.out[1] + h) * s_.out[2];
        if (s_.out[2] >= kLanes) {
          math::store(at, four[d][h]);
        } else {
          write_short(four[d][h], at, row + h);
        }
      }
    }
  }

  /// A row of less than a vector, or two of them.
  void write_short(V values, float* to, int64_t row) const {
    std::memcpy(to, &values, s_.out[2] * sizeof(float));
    if (tile_.vector_rows == 1 || row + 2 >= s_.out[1]) return;
    std::memcpy(to + 2 * s_.out[2], reinterpret_cast<const float*>(&values) + kLanes / 2, s_.out[2] * sizeof(float));
  }

  const ConvShape& s_;
  const WinogradProblem& p_;
  WinogradTile tile_;
  int64_t row_groups_;
  int64_t plane_pairs_;
  int64_t channel_;  // elements of a channel of the result
  InputForms forms_;
};

}  // namespace

void winograd_conv(const WinogradProblem& p, int64_t first_unit, int64_t last_unit) {
  const int64_t elements = InputForms::elements(*p.shape);
  const Buffer<float> memory(elements);
  std::memset(memory.get(), 0, elements * sizeof(float));
  const Planes planes(p, memory.get());
  for (int64_t unit = first_unit; unit < last_unit; ++unit) planes.write(unit);
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
