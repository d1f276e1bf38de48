// SPDX-License-Identifier: Apache-2.0
//
// The sums of one thread: kConvOutputs outputs × a few rows of a tile, in registers.
#pragma once

#include "conv3d/cuda/conv_square_tile.h"

namespace timm_ext::cuda {

template <int kWindow>
class ConvSums {
 public:
  static constexpr int kRows = conv_rows(kWindow);

  __device__ __forceinline__ ConvSums(const ConvTiling& p, const ConvPlace& place) {
    const int rows = place.units * p.rows;
    TIMM_EXT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int row = row_of(p, r);
      int tap = row % p.rows;
      const int w = tap % p.taps[2];
      tap /= p.taps[2];
      const int h = tap % p.taps[1], d = tap / p.taps[1];
      const int at = row / p.rows * p.unit_floats + d * p.tap_step[0] * p.plane_floats +
                     h * p.tap_step[1] * p.line_floats + w * p.tap_step[2] + p.lead;
      offset_[r] = row < rows ? at : p.lead;  // what a row that is not there sums is dropped
    }
  }

  __device__ __forceinline__ void clear() {
    TIMM_EXT_UNROLL
    for (int k = 0; k < kConvOutputs; ++k) {
      TIMM_EXT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        TIMM_EXT_UNROLL
        for (int j = 0; j < kWindow; ++j) sum_[k][r][j] = 0;
      }
    }
  }

  /// Adds the products of a box's points in the given numbers of planes and lines.
  __device__ __forceinline__ void add_box(const ConvTiling& p, const float* slab, const float* grad, int planes,
                                          int lines) {
    const int output_thread = static_cast<int>(threadIdx.x) / p.lanes;
    if (output_thread >= p.output_threads) return;
    grad += output_thread * p.grad_floats;
    TIMM_EXT_NO_UNROLL
    for (int d = 0; d < planes; ++d) {
      TIMM_EXT_NO_UNROLL
      for (int h = 0; h < lines; ++h) {
        add_line(p, slab + d * p.point_step[0] * p.plane_floats + h * p.point_step[1] * p.line_floats,
                 grad + (d * p.box[1] + h) * p.box[2]);
      }
    }
  }

  /// Hands out the sums in the order of memory: for each k, the kth outputs of all threads go through shared memory to
  /// sink(output, column, sum).
  template <class Sink>
  __device__ __forceinline__ void hand_out(const ConvTiling& p, const ConvPlace& place, float* shared,
                                           const Sink& sink) const {
    const int output_thread = static_cast<int>(threadIdx.x) / p.lanes;
    const int rows = place.units * p.rows, columns = rows * kWindow;
    TIMM_EXT_UNROLL
    for (int k = 0; k < kConvOutputs; ++k) {
      __syncthreads();
      if (output_thread < p.output_threads) {
        TIMM_EXT_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const int row = row_of(p, r);
          if (row >= rows) continue;
          float* const to = shared + output_thread * columns + row * kWindow;
          TIMM_EXT_UNROLL
          for (int j = 0; j < kWindow; ++j) to[j] = sum_[k][r][j];
        }
      }
      __syncthreads();
      for (int o = 0; o < p.output_threads; ++o) {
        const int output = k * p.output_threads + o;
        if (output >= place.outputs) break;
        for (int c = static_cast<int>(threadIdx.x); c < columns; c += p.threads) {
          sink(output, c, shared[o * columns + c]);
        }
      }
    }
    __syncthreads();
  }

 private:
  /// Threads next to each other take windows next to each other, which lie in different banks, or else single columns.
  __device__ __forceinline__ int row_of(const ConvTiling& p, int r) const {
    const int lane = static_cast<int>(threadIdx.x) % p.lanes;
    return kWindow == 3 ? lane * kRows + r : r * p.lanes + lane;
  }

  __device__ __forceinline__ void add_line(const ConvTiling& p, const float* slab, const float* grad) {
    if constexpr (kWindow == 3) {
      add_windows(p, slab, grad);
    } else {
      TIMM_EXT_NO_UNROLL
      for (int w = 0; w < p.box[2]; w += kConvStep) {
        float values[kRows][kConvStep];
        TIMM_EXT_UNROLL
        for (int r = 0; r < kRows; ++r) {
          TIMM_EXT_UNROLL
          for (int j = 0; j < kConvStep; ++j) values[r][j] = slab[offset_[r] + (w + j) * p.point_step[2]];
        }
        add_products(p, values, grad + w);
      }
    }
  }

  /// The last tap of four points is the first of the next four: each value is loaded once, in vectors.
  __device__ __forceinline__ void add_windows(const ConvTiling& p, const float* slab, const float* grad) {
    float values[kRows][kConvStep + 2];
    float4 next[kRows];
    TIMM_EXT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      values[r][0] = slab[offset_[r]];
      next[r] = *reinterpret_cast<const float4*>(slab + offset_[r] + 1);
    }
    TIMM_EXT_NO_UNROLL
    for (int w = 0; w < p.box[2]; w += kConvStep) {
      TIMM_EXT_UNROLL
      for (int r = 0; r < kRows; ++r) {
        values[r][1] = next[r].x;
        values[r][2] = next[r].y;
        values[r][3] = next[r].z;
        values[r][4] = next[r].w;
        next[r] = *reinterpret_cast<const float4*>(slab + offset_[r] + 1 + kConvStep + w);
        values[r][5] = next[r].x;
      }
      add_products(p, values, grad + w);
      TIMM_EXT_UNROLL
      for (int r = 0; r < kRows; ++r) values[r][0] = values[r][4];
    }
  }

  __device__ __forceinline__ void add_products(const ConvTiling& p,
                                               const float (&values)[kRows][kConvStep + kWindow - 1],
                                               const float* grad) {
    TIMM_EXT_UNROLL
    for (int k = 0; k < kConvOutputs; ++k) {
      const float4 four = *reinterpret_cast<const float4*>(grad + k * p.output_threads * p.grad_floats);
      const float g[kConvStep] = {four.x, four.y, four.z, four.w};
      TIMM_EXT_UNROLL
      for (int i = 0; i < kConvStep; ++i) {
        TIMM_EXT_UNROLL
        for (int r = 0; r < kRows; ++r) {
          TIMM_EXT_UNROLL
          for (int j = 0; j < kWindow; ++j) sum_[k][r][j] += g[i] * values[r][i + j];
        }
      }
    }
  }

  int offset_[kRows];
  float sum_[kConvOutputs][kRows][kWindow];
};

}  // namespace timm_ext::cuda
