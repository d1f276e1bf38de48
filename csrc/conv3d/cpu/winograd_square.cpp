// SPDX-License-Identifier: Apache-2.0
//
// The lanes of vectors are values of grad, a value of the input is broadcast to them; a block of both is summed in
// registers over the tiles of a slab. Compiled with fused multiply-add where there is one: the bits hang on the
// instruction set, but not on the number of threads.
#include "conv3d/cpu/winograd_square.h"

#include <cstring>

#include "conv3d/cpu/kernels.h"
#include "conv3d/cpu/tile.h"
#include "conv3d/cpu/weight_block.h"
#include "cpu/buffer.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int64_t kBlockVectors = kSquareLanes / kLanes;

/// The products of one form, of some vectors of grad.
class FormProducts {
 public:
  FormProducts(const WinogradSquareProblem& p, int64_t form, int64_t first_vector)
      : p_(p), layout_(*p.layout), tiles_(p.slab_lines() * p.layout->tiles), form_(form), first_vector_(first_vector) {}

  template <int Vectors>
  void add() const {
    constexpr int rows = kLanes < kSquareLanes ? 4 : Vectors == 1 ? 16 : 8;  // for which there are registers
    for (int64_t i = 0; i < p_.shape->inputs; i += rows) add_rows<rows, Vectors>(i);
  }

 private:
  /// Of some inputs, which may be padding at the end of a block.
  template <int Rows, int Vectors>
  void add_rows(int64_t first_input) const {
    const int64_t block = first_input / kSquareLanes, first = first_input % kSquareLanes;
    const float* const x = p_.packed_input + block * layout_.block() + form_ * layout_.form() + first;
    const float* g[Vectors];
    float* to[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      const int64_t of = (first_vector_ + v) / kBlockVectors, lane = (first_vector_ + v) % kBlockVectors * kLanes;
      g[v] = p_.packed_grad + of * layout_.block() + form_ * layout_.form() + lane;
      to[v] = p_.sums + form_ * layout_.form_sums() +
              ((of * layout_.input_blocks + block) * kSquareLanes + first) * kSquareLanes + lane;
    }
    V sums[Rows][Vectors] = {};
    add_products(
        tiles_, [&](int64_t k, int r) { return math::broadcast(x + k * kSquareLanes + r); },
        [&](int64_t k, int v) { return math::load<V>(g[v] + k * kSquareLanes); }, sums);
    for (int r = 0; r < Rows; ++r) {
      for (int v = 0; v < Vectors; ++v) {
        float* const place = to[v] + r * kSquareLanes;
        math::store(place, p_.first_slab ? sums[r][v] : math::load<V>(place) + sums[r][v]);
      }
    }
  }

  const WinogradSquareProblem& p_;
  const WinogradSquareLayout& layout_;
  int64_t tiles_;
  int64_t form_;
  int64_t first_vector_;
};

/// Of the products of four forms, `step` apart, the sums at three taps.
TIMM_EXT_FN void combine(const V* from, int64_t step, V* to, int64_t to_step) {
  const V half_sum = 0.5f * (from[step] + from[2 * step]), half_difference = 0.5f * (from[step] - from[2 * step]);
  to[0] = from[0] + half_sum;
  to[to_step] = half_difference;
  to[2 * to_step] = half_sum + from[3 * step];
}

/// Of the products of all forms, [plane forms, 4, 4], the sums at the taps, [planes, 3, 3].
TIMM_EXT_FN void combine_all(V (&forms)[64], int64_t plane_forms, V (&taps)[27]) {
  V rows[4 * 4 * 3], planes[4 * 3 * 3];
  for (int64_t k = 0; k < plane_forms * 4; ++k) combine(forms + 4 * k, 1, rows + 3 * k, 1);
  for (int64_t d = 0; d < plane_forms; ++d) {
    for (int64_t w = 0; w < 3; ++w) combine(rows + 12 * d + w, 3, planes + 9 * d + w, 3);
  }
  for (int64_t k = 0; k < 9; ++k) {
    if (plane_forms == 1) {
      taps[k] = planes[k];
    } else {
      combine(planes + k, 9, taps + k, 9);
    }
  }
}

/// The weights of a block of outputs × one of inputs.
void write_block(const WinogradSquareProblem& p, int64_t grad_block, int64_t input_block) {
  const ConvShape& s = *p.shape;
  const WinogradSquareLayout& layout = *p.layout;
  const int64_t taps = s.kernel[0] * s.kernel[1] * s.kernel[2], step = s.inputs * taps;
  const int64_t first = grad_block * kSquareLanes, outputs = smaller_of(s.outputs - first, kSquareLanes);
  const int64_t inputs = smaller_of(s.inputs - input_block * kSquareLanes, kSquareLanes);
  const float* const sums = p.sums + (grad_block * layout.input_blocks + input_block) * kSquareLanes * kSquareLanes;
  float values[27 * kSquareLanes];
  for (int64_t i = 0; i < inputs; ++i) {
    for (int64_t lane = 0; lane < kSquareLanes; lane += kLanes) {
      V forms[64], at_taps[27];
      for (int64_t k = 0; k < layout.forms(); ++k) {
        const float* const from = sums + k * layout.form_sums() + i * kSquareLanes + lane;
        forms[k] = math::load<V>(from);
        for (int64_t part = 1; part < layout.parts; ++part) {
          forms[k] += math::load<V>(from + part * layout.part_sums());
        }
      }
      combine_all(forms, layout.plane_forms(), at_taps);
      for (int64_t k = 0; k < taps; ++k) {
        math::store(values + k * kSquareLanes + lane, p.squared ? at_taps[k] * at_taps[k] : at_taps[k]);
      }
    }
    float* const to = p.accumulator + first * step + (input_block * kSquareLanes + i) * taps;
    add_weights(values, kSquareLanes, taps, outputs, p.scale, to, step);
  }
}

}  // namespace

void winograd_square_add(const WinogradSquareProblem& p, int64_t first_unit, int64_t last_unit) {
  const int64_t pairs = p.grad_pairs(), vectors = p.layout->grad_blocks * kBlockVectors;
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t first = unit % pairs * 2 * kBlockVectors, last = smaller_of(first + 2 * kBlockVectors, vectors);
    for (int64_t v = first; v < last; v += 2) {
      const FormProducts products(p, unit / pairs, v);
      v + 1 < last ? products.add<2>() : products.add<1>();
    }
  }
}

void winograd_square_write(const WinogradSquareProblem& p, int64_t first_unit, int64_t last_unit) {
  const int64_t blocks = p.layout->input_blocks;
  for (int64_t unit = first_unit; unit < last_unit; ++unit) write_block(p, unit / blocks, unit % blocks);
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
