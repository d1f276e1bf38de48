// SPDX-License-Identifier: Apache-2.0
//
// The lanes of vectors are columns, whose products are summed tap by tap; what some rows of the gradient hold stays in
// registers while the taps of a column of the kernel meet the rows of the input. Lanes, and chunks of planes, are added
// in float64. Compiled with fused multiply-add where there is one: the bits hang on the instruction set, but not on the
// number of threads.
#include <cstring>

#include "conv3d/cpu/depthwise_pack.h"
#include "conv3d/cpu/kernels.h"
#include "cpu/buffer.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int kRows = math::kVectorBytes == 64 ? 8 : 4;

/// sums[tap] += Σ grad[row][vector] x[row + tap][vector] for the taps of one run.
template <int Vectors, int Taps>
TIMM_EXT_FN void add_run(const float* x, int64_t columns, const V (&grad)[kRows][Vectors], float* memory) {
  V sums[Taps];
#pragma GCC unroll 8
  for (int k = 0; k < Taps; ++k) sums[k] = math::load<V>(memory + k * kLanes);
#pragma GCC unroll 16
  for (int row = 0; row < kRows + Taps - 1; ++row, x += columns) {
    V factors[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) factors[v] = math::load<V>(x + v * kLanes);
#pragma GCC unroll 8
    for (int k = 0; k < Taps; ++k) {
      if (row < k || row >= k + kRows) continue;
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sums[k] += grad[row - k][v] * factors[v];
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < Taps; ++k) math::store(memory + k * kLanes, sums[k]);
}

/// The same for runs that have as many taps.
template <int Vectors, int Taps>
__attribute__((noinline)) void add_runs(const float* packed, int64_t columns, const DepthwiseRun* run,
                                        const DepthwiseRun* last, const float* g, int64_t grad_columns, float* sums) {
  V grad[kRows][Vectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) grad[row][v] = math::load<V>(g + row * grad_columns + v * kLanes);
  }
  for (; run != last; ++run) {
    add_run<Vectors, Taps>(packed + run->place, columns, grad, sums + run->first * kLanes);
  }
}

template <int Vectors>
void add_some(int64_t taps, const float* packed, int64_t columns, const DepthwiseRun* run, const DepthwiseRun* last,
              const float* grad, int64_t grad_columns, float* sums) {
  switch (taps) {
    case 1:
      return add_runs<Vectors, 1>(packed, columns, run, last, grad, grad_columns, sums);
    case 2:
      return add_runs<Vectors, 2>(packed, columns, run, last, grad, grad_columns, sums);
    case 3:
      return add_runs<Vectors, 3>(packed, columns, run, last, grad, grad_columns, sums);
    case 4:
      return add_runs<Vectors, 4>(packed, columns, run, last, grad, grad_columns, sums);
    case 5:
      return add_runs<Vectors, 5>(packed, columns, run, last, grad, grad_columns, sums);
    case 6:
      return add_runs<Vectors, 6>(packed, columns, run, last, grad, grad_columns, sums);
    default:
      return add_runs<Vectors, 7>(packed, columns, run, last, grad, grad_columns, sums);
  }
}

/// The gradient of a channel's weights.
class Channel {
 public:
  Channel(const DepthwiseSquareProblem& p, const DepthwisePack& input, const DepthwisePack& grad, float* sums,
          double* totals)
      : p_(p), l_(*p.layout), g_(*p.grad_layout), input_(input), grad_(grad), sums_(sums), totals_(totals) {}

  void add(int64_t channel) const {
    std::memset(totals_, 0, l_.taps * sizeof(double));
    for (int64_t b = 0; b < p_.examples; ++b) {
      const int64_t all = b * p_.channels + channel;
      for (int64_t chunk = 0; chunk < l_.chunks; ++chunk) {
        input_.fill(p_.input + all * l_.points(), chunk);
        grad_.fill(p_.grad + all * g_.points(), chunk);
        add_chunk(smaller_of(l_.chunk, l_.out[0] - chunk * l_.chunk));
      }
      if (p_.squared || b + 1 == p_.examples) leave(channel);
    }
  }

 private:
  void add_chunk(int64_t planes) const {
    std::memset(sums_, 0, l_.taps * kLanes * sizeof(float));
    for (int64_t plane = 0; plane < planes; ++plane) {
      for (int64_t row = 0; row < l_.out[1]; row += kRows) {
        add_rows((plane * l_.rows + row) * l_.columns, (plane * g_.rows + row) * g_.columns);
      }
    }
    for (int64_t tap = 0; tap < l_.taps; ++tap) {
      double lanes[4] = {};  // chains
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane % 4] += sums_[tap * kLanes + lane];
      totals_[tap] += (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    }
  }

  void add_rows(int64_t at, int64_t grad_at) const {
    int64_t w = 0;
    for (; w + kLanes < l_.out[2]; w += 2 * kLanes) add_vectors<2>(at + w, grad_at + w);
    if (w < l_.out[2]) add_vectors<1>(at + w, grad_at + w);
  }

  template <int Vectors>
  void add_vectors(int64_t at, int64_t grad_at) const {
    const DepthwiseRun *run = l_.runs + l_.targets->first_run, *const last = l_.runs + l_.targets->last_run;
    while (run != last) {
      const DepthwiseRun* end = run + 1;
      while (end != last && end->taps == run->taps) ++end;
      add_some<Vectors>(run->taps, input_.get() + at, l_.columns, run, end, grad_.get() + grad_at, g_.columns, sums_);
      run = end;
    }
  }

  /// Adds an example's gradient, or that of all, to the accumulator.
  void leave(int64_t channel) const {
    float* const to = p_.accumulator + channel * l_.taps;
    for (int64_t tap = 0; tap < l_.taps; ++tap) {
      const auto total = static_cast<float>(totals_[tap]);
      to[l_.order[tap]] += p_.scale * (p_.squared ? total * total : total);
    }
    std::memset(totals_, 0, l_.taps * sizeof(double));
  }

  const DepthwiseSquareProblem& p_;
  const DepthwiseLayout& l_;
  const DepthwiseLayout& g_;
  const DepthwisePack& input_;
  const DepthwisePack& grad_;
  float* sums_;
  double* totals_;
};

}  // namespace

void depthwise_square(const DepthwiseSquareProblem& p, int64_t first_channel, int64_t last_channel) {
  const DepthwiseLayout& l = *p.layout;
  const Buffer<float> packed(l.packed_elements()), packed_grad(p.grad_layout->packed_elements());
  const Buffer<float> sums(l.taps * kLanes);
  const Buffer<double> totals(l.taps);
  const int64_t all = p.examples * p.channels;
  const DepthwisePack input(l, p.input + all * l.points(), packed.get());
  const DepthwisePack grad(*p.grad_layout, p.grad + all * p.grad_layout->points(), packed_grad.get());
  const Channel work(p, input, grad, sums.get(), totals.get());
  for (int64_t channel = first_channel; channel < last_channel; ++channel) work.add(channel);
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
