// SPDX-License-Identifier: Apache-2.0
//
// Depthwise convolutions, each channel by a kernel of its own, and the gradients of their inputs and weights.
//
// All are sums of a kernel's taps over volumes at stride 1. Where a point j meets, with stride s and dilation d, the
// input at s j + k d for tap k, the input is taken apart into its phases x_p[j] = x[s j + p], and
//     y[j] = Σ_k w[k] x_p[j + o]    k d = s o + p
// On the way back the phases are those of the result, of which every one sums its own taps over all of the gradient:
//     x_p[j] = Σ_k w[k] y[j − o]
// A channel is packed, phase by phase and zero-padded; the taps of a column of the kernel meet neighbouring rows.
#pragma once

#include <cstdint>
#include <vector>

#include "conv3d/problem.h"
#include "math/portable.h"

namespace timm_ext::cpu {

constexpr int64_t kDepthwiseTaps = 7;      // of a column that go together at most
constexpr int64_t kDepthwiseRows = 8;      // of a phase are padded to a multiple, taps apart
constexpr int64_t kDepthwiseColumns = 16;  // likewise

/// Some taps of a column, which meet neighbouring rows.
struct DepthwiseRun {
  int64_t place;  // in the packed channel, of what the first one meets at the first point
  int64_t first;  // the first one's place in the order of the taps
  int64_t taps;
};

/// On an axis, number j of a phase is start + step j of what is packed, for j in [first, last), or else zero.
struct DepthwisePhase {
  int64_t start;
  int64_t first;
  int64_t last;
};

/// Points of the result that sum the same taps.
struct DepthwiseTarget {
  int64_t start[3];  // the first one
  int64_t count[3];  // on each axis
  int64_t first_run;
  int64_t last_run;
};

/// What the kernels read of a tiling: they leave its vectors alone, see cpu/buffer.h.
struct DepthwiseLayout {
  int64_t in[3];  // sizes of what is packed
  int64_t step[3];
  const DepthwisePhase* phases[3];
  int64_t phase_count[3];
  int64_t chunk;  // planes of a target that go together
  int64_t chunks;
  int64_t planes;  // of a phase, for a chunk
  int64_t rows;
  int64_t columns;
  const DepthwiseTarget* targets;
  int64_t target_count;
  int64_t target_step[3];
  int64_t out[3];  // sizes of the result
  const DepthwiseRun* runs;
  const int64_t* order;  // of the taps that are met
  int64_t met;
  int64_t taps;

  TIMM_EXT_FN int64_t points() const { return in[0] * in[1] * in[2]; }
  TIMM_EXT_FN int64_t phase_elements() const { return planes * rows * columns; }
  TIMM_EXT_FN int64_t packed_elements() const {
    return phase_count[0] * phase_count[1] * phase_count[2] * phase_elements() + kDepthwiseColumns;
  }
};

/// A layout and what it points to. Of one group of a convolution with one input and one output; transposed: what makes
/// its input, of the sizes `shape.in`, of its output. Chunks of a given number of planes, or of as many as suit (0).
class DepthwiseTiling {
 public:
  DepthwiseTiling(const ConvShape& shape, bool transposed, int64_t chunk = 0);
  DepthwiseTiling(const DepthwiseTiling&) = delete;
  DepthwiseTiling& operator=(const DepthwiseTiling&) = delete;

  const DepthwiseLayout& layout() const { return layout_; }

 private:
  /// A tap on one axis: its number, the phase it meets, and at which j the first point meets it.
  struct Tap {
    int64_t number;
    int64_t phase;
    int64_t offset;
  };
  struct Target {
    int64_t start;
    int64_t count;
    std::vector<Tap> taps;
  };
  struct Axis {
    std::vector<DepthwisePhase> phases;
    std::vector<Target> targets;
    int64_t count = 0;  // of the largest target
    int64_t reach = 0;  // the largest offset
  };

  static Axis plain_axis(const ConvShape& shape, int axis);
  static Axis transposed_axis(const ConvShape& shape, int axis);
  void set_sizes(const ConvShape& shape, bool transposed, int64_t chunk);
  void add_target(const ConvShape& shape, const Target& plane, const Target& row, const Target& column);

  Axis axes_[3];
  std::vector<DepthwiseTarget> targets_;
  std::vector<DepthwiseRun> runs_;
  std::vector<int64_t> order_;
  DepthwiseLayout layout_;
};

struct DepthwiseProblem {
  const DepthwiseLayout* layout;
  const float* input;    // [examples, channels, in]
  const float* weights;  // [channels, taps]
  const float* bias;     // [channels], or null for none
  float* output;         // [examples, channels, out]
  int64_t examples;
  int64_t channels;
};

/// Units of work: a chunk of planes of a channel of an example.
TIMM_EXT_FN int64_t depthwise_units(const DepthwiseProblem& p) { return p.examples * p.channels * p.layout->chunks; }

/// accumulator[c, tap] += scale Σ_b G_b², or scale Σ_b G_b, G_b = Σ_j grad[j] x[j + tap]. A unit is a channel.
struct DepthwiseSquareProblem {
  const DepthwiseLayout* layout;       // of the input, with one target
  const DepthwiseLayout* grad_layout;  // of a convolution by one tap, with the same chunks
  const float* grad;                   // [examples, channels, out]
  const float* input;                  // [examples, channels, in]
  float* accumulator;                  // [channels, taps]
  int64_t examples;
  int64_t channels;
  float scale;
  bool squared;
};

}  // namespace timm_ext::cpu
