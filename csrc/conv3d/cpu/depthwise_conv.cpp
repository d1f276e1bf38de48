// SPDX-License-Identifier: Apache-2.0
//
// The lanes of vectors are columns of some rows of the result. A row of the packed channel is read once for each column
// of the kernel, and taken by all rows whose taps meet it. Compiled with fused multiply-add where there is one: the
// bits hang on the instruction set, but not on the number of threads.
#include <cstring>

#include "conv3d/cpu/depthwise_pack.h"
#include "conv3d/cpu/kernels.h"
#include "cpu/buffer.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int kRows = math::kVectorBytes == 64 ? 8 : 4;  // for which, times two vectors, there are registers

/// sums[row][vector] += Σ_k w[k] x[row + k][vector] over the taps of runs that have as many.
template <int Rows, int Vectors, int Taps>
__attribute__((noinline)) void add_runs(const float* packed, int64_t columns, const DepthwiseRun* run,
                                        const DepthwiseRun* last, const float* weights, float* memory) {
  V sums[Rows][Vectors];
  std::memcpy(&sums, memory, sizeof(sums));
  for (; run != last; ++run) {
    const float* const w = weights + run->first;
    const float* x = packed + run->place;
    V taps[Taps];
#pragma GCC unroll 8
    for (int k = 0; k < Taps; ++k) taps[k] = math::broadcast(w + k);
#pragma GCC unroll 16
    for (int row = 0; row < Rows + Taps - 1; ++row, x += columns) {
      V factors[Vectors];
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) factors[v] = math::load<V>(x + v * kLanes);
#pragma GCC unroll 8
      for (int k = 0; k < Taps; ++k) {
        if (row < k || row >= k + Rows) continue;
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) sums[row - k][v] += taps[k] * factors[v];
      }
    }
  }
  std::memcpy(memory, &sums, sizeof(sums));
}

template <int Rows, int Vectors>
void add_some(int64_t taps, const float* packed, int64_t columns, const DepthwiseRun* run, const DepthwiseRun* last,
              const float* weights, float* sums) {
  switch (taps) {
    case 1:
      return add_runs<Rows, Vectors, 1>(packed, columns, run, last, weights, sums);
    case 2:
      return add_runs<Rows, Vectors, 2>(packed, columns, run, last, weights, sums);
    case 3:
      return add_runs<Rows, Vectors, 3>(packed, columns, run, last, weights, sums);
    case 4:
      return add_runs<Rows, Vectors, 4>(packed, columns, run, last, weights, sums);
    case 5:
      return add_runs<Rows, Vectors, 5>(packed, columns, run, last, weights, sums);
    case 6:
      return add_runs<Rows, Vectors, 6>(packed, columns, run, last, weights, sums);
    default:
      return add_runs<Rows, Vectors, 7>(packed, columns, run, last, weights, sums);
  }
}

/// A channel of an example.
class Channel {
 public:
  Channel(const DepthwiseProblem& p, const DepthwisePack& pack, float* weights)
      : p_(p), l_(*p.layout), pack_(pack), weights_(weights) {}

  void write(int64_t example, int64_t channel, int64_t chunk) {
    const int64_t all = example * p_.channels + channel;
    pack_.fill(p_.input + all * l_.points(), chunk);
    for (int64_t tap = 0; tap < l_.met; ++tap) weights_[tap] = p_.weights[channel * l_.taps + l_.order[tap]];
    bias_ = p_.bias == nullptr ? 0.0f : p_.bias[channel];
    output_ = p_.output + all * (l_.out[0] * l_.out[1] * l_.out[2]);
    for (int64_t t = 0; t < l_.target_count; ++t) write_target(l_.targets[t], chunk * l_.chunk);
  }

 private:
  void write_target(const DepthwiseTarget& target, int64_t first_plane) const {
    const int64_t planes = smaller_of(l_.chunk, target.count[0] - first_plane);
    for (int64_t plane = 0; plane < planes; ++plane) {
      for (int64_t row = 0; row < target.count[1]; row += kRows) {
        const int64_t at = (plane * l_.rows + row) * l_.columns;
        float* const to = output_ +
                          ((target.start[0] + (first_plane + plane) * l_.target_step[0]) * l_.out[1] + target.start[1] +
                           row * l_.target_step[1]) *
                              l_.out[2] +
                          target.start[2];
        const int64_t rows = smaller_of(kRows, target.count[1] - row);
        rows <= 2 ? write_rows<2>(target, at, rows, to) : write_rows<kRows>(target, at, rows, to);
      }
    }
  }

  template <int Rows>
  void write_rows(const DepthwiseTarget& target, int64_t at, int64_t rows, float* to) const {
    int64_t w = 0;
    for (; w + kLanes < target.count[2]; w += 2 * kLanes) write_vectors<Rows, 2>(target, at, rows, w, to);
    if (w < target.count[2]) write_vectors<Rows, 1>(target, at, rows, w, to);
  }

  template <int Rows, int Vectors>
  void write_vectors(const DepthwiseTarget& target, int64_t at, int64_t rows, int64_t w, float* to) const {
    alignas(64) float sums[Rows * Vectors * kLanes];
    for (float& sum : sums) sum = bias_;
    const DepthwiseRun *run = l_.runs + target.first_run, *const last = l_.runs + target.last_run;
    while (run != last) {
      const DepthwiseRun* end = run + 1;
      while (end != last && end->taps == run->taps) ++end;
      add_some<Rows, Vectors>(run->taps, pack_.get() + at + w, l_.columns, run, end, weights_, sums);
      run = end;
    }
    const int64_t step = l_.target_step[2], count = smaller_of(Vectors * kLanes, target.count[2] - w);
    for (int64_t row = 0; row < rows; ++row, to += l_.target_step[1] * l_.out[2]) {
      write_row(sums + row * Vectors * kLanes, count, step, to + w * step);
    }
  }

  static void write_row(const float* sums, int64_t count, int64_t step, float* to) {
    if (step == 1) {
      std::memcpy(to, sums, count * sizeof(float));
      return;
    }
    for (int64_t j = 0; j < count; ++j) to[j * step] = sums[j];
  }

  const DepthwiseProblem& p_;
  const DepthwiseLayout& l_;
  const DepthwisePack& pack_;
  float* weights_;
  float bias_ = 0.0f;
  float* output_ = nullptr;
};

}  // namespace

void depthwise_conv(const DepthwiseProblem& p, int64_t first_unit, int64_t last_unit) {
  const DepthwiseLayout& l = *p.layout;
  const Buffer<float> packed(l.packed_elements()), weights(l.taps);
  const DepthwisePack pack(l, p.input + p.examples * p.channels * l.points(), packed.get());
  Channel work(p, pack, weights.get());
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t channel = unit / l.chunks;
    work.write(channel / p.channels, channel % p.channels, unit % l.chunks);
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
