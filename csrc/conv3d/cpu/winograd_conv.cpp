// SPDX-License-Identifier: Apache-2.0
//
// The lanes of vectors are columns of the output. The forms of the inputs of some tile rows are made once and met by
// all outputs. Compiled with fused multiply-add where there is one: the bits hang on the instruction set, but not on
// the number of threads.
#include <cstring>
#include <type_traits>

#include "conv3d/cpu/kernels.h"
#include "conv3d/cpu/tile.h"
#include "conv3d/cpu/winograd_places.h"
#include "cpu/buffer.h"
#include "math/shuffle.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int64_t kChain = 16;  // channels of the input that are summed by themselves: long chains round more
constexpr int kOutputs = kTileOutputs;
constexpr int64_t kAhead = 6;           // channels of the input whose forms are fetched before they are met
constexpr int kGroup = 2;               // vectors that are computed together, or one
constexpr int64_t kManyInputs = 64;     // from which the weights of a form are worth reading once for some groups
constexpr int64_t kGroupsTogether = 4;  // whose products stay in the second-level cache

/// Sums of products of weights and forms of the input, form by form.
class Products {
 public:
  Products(const WinogradProblem& p, const WinogradTiling& tiling, const InputForms& forms, const Places& places)
      : s_(*p.shape),
        weights_(p.forms),
        block_(winograd_block_elements(s_)),
        weight_form_(winograd_weight_form(s_)),
        pitch_(tiling.pitch),
        form_count_(tiling.forms()),
        forms_(forms),
        places_(places),
        memory_(kGroupsTogether * kGroup * tiling.forms() * kOutputs) {}

  /// Vectors whose products are made at a time.
  int64_t together() const { return kGroup * (s_.inputs >= kManyInputs ? kGroupsTogether : 1); }

  /// Those of vectors [first, last) and of kOutputs channels of the output.
  void make(int64_t first_output, int64_t first, int64_t last) const {
    const float* weights = weights_ + first_output / kWinogradOutputs * block_ + first_output % kWinogradOutputs;
    for (int64_t form = 0; form < form_count_; ++form, weights += weight_form_) {
      V* to = memory_.get() + form * kOutputs * kGroup;
      int64_t v = first;
      for (; v + 2 <= last; v += 2, to += form_count_ * kOutputs * kGroup) {
        if (places_.halves()) {
          add_inputs<true, 2>(weights, form, v, to);
        } else {
          add_inputs<false, 2>(weights, form, v, to);
        }
      }
      if (v == last) continue;
      if (places_.halves()) {
        add_inputs<true, 1>(weights, form, v, to);
      } else {
        add_inputs<false, 1>(weights, form, v, to);
      }
    }
  }

  /// Of a vector and an output among those last made.
  const V& at(int64_t form, int64_t output, int64_t vector) const {
    const int64_t group = vector / kGroup;
    return memory_.get()[((group * form_count_ + form) * kOutputs + output) * kGroup + vector % kGroup];
  }

 private:
  template <bool Halves, int Vectors>
  void add_inputs(const float* weights, int64_t form, int64_t vector, V* to) const {
    const float* x[Vectors];
    for (int v = 0; v < Vectors; ++v) x[v] = forms_.form(form) + places_.at(vector + v);
    for (int64_t i = 0; i < s_.inputs; i += kChain) {
      V sums[kOutputs][Vectors] = {};
      const int64_t inputs = smaller_of(kChain, s_.inputs - i);
      weights = s_.kernel[2] == 3 ? add_channels<Halves, 3>(weights, inputs, x, sums)
                                  : add_channels<Halves, 0>(weights, inputs, x, sums);
      for (int o = 0; o < kOutputs; ++o) {
        for (int v = 0; v < Vectors; ++v) {
          V& sum = to[o * kGroup + v];
          sum = i == 0 ? sums[o][v] : sum + sums[o][v];
        }
      }
    }
  }

  /// sums += weights · inputs of some channels; returns where the next ones' weights are.
  template <bool Halves, int Columns, int Vectors>
  const float* add_channels(const float* weights, int64_t inputs, const float* (&x)[Vectors],
                            V (&sums)[kOutputs][Vectors]) const {
    const int64_t columns = Columns > 0 ? Columns : s_.kernel[2];
    for (int64_t i = 0; i < inputs; ++i, weights += columns * kWinogradOutputs) {
      for (int v = 0; v < Vectors; ++v) __builtin_prefetch(x[v] + kAhead * forms_.line() + kLanes / 2);
      add_products(
          columns, [&](int64_t w, int o) { return math::broadcast(weights + w * kWinogradOutputs + o); },
          [&](int64_t w, int v) {
            return Halves ? math::load_halves(x[v] + w, x[v] + pitch_ + w) : math::load<V>(x[v] + w);
          },
          sums);
      for (int v = 0; v < Vectors; ++v) x[v] += forms_.line();
    }
    return weights;
  }

  const ConvShape& s_;
  const float* weights_;
  int64_t block_;
  int64_t weight_form_;
  int64_t pitch_;
  int64_t form_count_;
  const InputForms& forms_;
  const Places& places_;
  Buffer<V> memory_;  // [groups, forms, outputs, vectors of a group]
};

/// Units of work with these tiles.
template <class Planes, class Rows>
class Convolution {
 public:
  Convolution(const WinogradProblem& p, const WinogradTiling& tiling, float* memory)
      : s_(*p.shape),
        p_(p),
        tiling_(tiling),
        units_(p),
        channel_(s_.out[0] * s_.out[1] * s_.out[2]),
        forms_(s_, tiling, units_.rows, memory),
        places_(s_, tiling, units_.rows),
        products_(p, tiling, forms_, places_) {}

  void write(int64_t unit) {
    const int64_t first = unit / units_.parts * units_.rows, last = smaller_of(first + units_.rows, units_.all_rows);
    for (int64_t r = first; r < last; ++r)
      forms_.template make<Planes, Rows>(p_.input, WinogradTile(s_, tiling_, r), r - first);
    places_.find(first, last);
    const int64_t part = units_.part_blocks * kWinogradOutputs, begin = unit % units_.parts * part;
    for (int64_t o = begin; o < smaller_of(begin + part, s_.outputs); o += kOutputs) write_outputs(o);
  }

 private:
  void write_outputs(int64_t first) const {
    const int64_t outputs = smaller_of(kOutputs, s_.outputs - first), together = products_.together();
    for (int64_t v = 0; v < places_.count(); v += together) {
      const int64_t last = smaller_of(v + together, places_.count());
      products_.make(first, v, last);
      for (int64_t o = 0; o < outputs; ++o) {
        for (int64_t vector = v; vector < last; ++vector) write_vector(first + o, o, vector, vector - v);
      }
    }
  }

  /// All planes and rows of a tile, of one output.
  void write_vector(int64_t output, int64_t o, int64_t vector, int64_t made) const {
    V over_planes[Planes::kOutputs][Rows::kForms];
    for (int h = 0; h < Rows::kForms; ++h) {
      V products[Planes::kForms], sums[Planes::kOutputs];
      for (int d = 0; d < Planes::kForms; ++d) products[d] = products_.at(d * Rows::kForms + h, o, made);
      Planes::outputs(products, sums);
      for (int d = 0; d < Planes::kOutputs; ++d) over_planes[d][h] = sums[d];
    }
    const V bias = p_.bias != nullptr ? math::broadcast(p_.bias + output) : V{};
    V tile[Planes::kOutputs][Rows::kOutputs];
    for (int d = 0; d < Planes::kOutputs; ++d) {
      Rows::outputs(over_planes[d], tile[d]);
      for (int h = 0; h < Rows::kOutputs; ++h) tile[d][h] += bias;
    }
    places_.each_segment(vector, [&](const Segment& segment) { store(tile, segment, output); });
  }

  template <int TilePlanes, int TileRows>
  void store(const V (&tile)[TilePlanes][TileRows], const Segment& segment, int64_t output) const {
    float* const first = p_.output + output * channel_ + segment.to;
    for (int64_t d = 0; d < segment.planes; ++d) {
      for (int64_t h = 0; h < segment.rows; ++h) {
        float* const to = first + (d * s_.out[1] + h) * s_.out[2];
        if (segment.count < kLanes) {
          math::store_lanes(to, tile[d][h], segment.lane, segment.count);
        } else if (p_.streamed && reinterpret_cast<uintptr_t>(to) % sizeof(V) == 0) {
          math::stream(to, tile[d][h]);
        } else {
          math::store(to, tile[d][h]);
        }
      }
    }
  }

  const ConvShape& s_;
  const WinogradProblem& p_;
  const WinogradTiling& tiling_;
  WinogradUnits units_;
  int64_t channel_;  // elements of a channel of the result
  InputForms forms_;
  Places places_;
  Products products_;
};

}  // namespace

void winograd_conv(const WinogradProblem& p, int64_t first_unit, int64_t last_unit) {
  const WinogradTiling tiling(*p.shape);
  const int64_t elements = InputForms::elements(*p.shape, tiling, WinogradUnits(p).rows);
  const Buffer<float> memory(elements);
  std::memset(memory.get(), 0, elements * sizeof(float));
  with_winograd_axes(p.shape->kernel[1], tiling.planes, tiling.rows, [&](auto* planes, auto* rows) {
    using Planes = std::remove_pointer_t<decltype(planes)>;
    using Rows = std::remove_pointer_t<decltype(rows)>;
    Convolution<Planes, Rows> convolution(p, tiling, memory.get());
    for (int64_t unit = first_unit; unit < last_unit; ++unit) convolution.write(unit);
  });
  math::end_stream();
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
