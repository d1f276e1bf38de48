// SPDX-License-Identifier: Apache-2.0
//
// The variance is that of parts, each about its own mean, put together (Chan, Golub and LeVeque 1979): a part stays in
// the first-level cache between the two. With w, b the affine parameters and ρ = 1 / sqrt(variance + epsilon)
//     output = w ρ (x − μ) + b
#include <cmath>

#include "norm/cpu/column_sums.h"
#include "norm/cpu/kernels.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int64_t kPart = 64 * kColumns;  // points

/// A mean and the sum of squared distances from it.
struct Moments {
  double points = 0;
  double mean = 0;
  double squares = 0;

  void join(const Moments& other) {
    const double together = points + other.points, apart = other.mean - mean;
    mean += apart * other.points / together;
    squares += other.squares + apart * apart * points * other.points / together;
    points = together;
  }
};

double sum_of(const float* input, int64_t points) {
  V sums[kVectors] = {};
  int64_t i = 0;
  for (; i + kColumns <= points; i += kColumns) {
    for (int v = 0; v < kVectors; ++v) sums[v] += math::load<V>(input + i + v * kLanes);
  }
  double sum = total(sums);
  for (; i < points; ++i) sum += input[i];
  return sum;
}

/// About a point near the mean: the sum above rounds where the mean is large.
Moments moments_about(float near, const float* input, int64_t points) {
  V sums[2][kVectors] = {};
  int64_t i = 0;
  for (; i + kColumns <= points; i += kColumns) {
    for (int v = 0; v < kVectors; ++v) {
      const V apart = math::load<V>(input + i + v * kLanes) - near;
      sums[0][v] += apart;
      sums[1][v] += apart * apart;
    }
  }
  double sum = total(sums[0]), squares = total(sums[1]);
  for (; i < points; ++i) {
    const float apart = input[i] - near;
    sum += apart;
    squares += apart * apart;
  }
  const double count = static_cast<double>(points);
  return {count, near + sum / count, squares - sum * sum / count};
}

Moments moments_of_part(const float* input, int64_t points) {
  return moments_about(static_cast<float>(sum_of(input, points) / static_cast<double>(points)), input, points);
}

void write(const float* input, int64_t points, float mean, float scale, float shift, float* to) {
  const int64_t whole = points / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) math::store(to + i, scale * (math::load<V>(input + i) - mean) + shift);
  for (int64_t i = whole; i < points; ++i) to[i] = scale * (input[i] - mean) + shift;
}

}  // namespace

void instance_norm(const InstanceNormProblem& p, int64_t first_plane, int64_t last_plane) {
  for (int64_t plane = first_plane; plane < last_plane; ++plane) {
    const float* const input = p.input + plane * p.points;
    Moments moments;
    for (int64_t i = 0; i < p.points; i += kPart) {
      moments.join(moments_of_part(input + i, smaller_of(kPart, p.points - i)));
    }
    const double squares = moments.squares < 0 ? 0 : moments.squares;  // a constant's may round to less
    p.mean[plane] = static_cast<float>(moments.mean);
    p.rstd[plane] = static_cast<float>(1 / std::sqrt(squares / moments.points + p.epsilon));
    const int64_t channel = plane % p.channels;
    const float scale = (p.weight != nullptr ? p.weight[channel] : 1) * p.rstd[plane];
    write(input, p.points, p.mean[plane], scale, p.bias != nullptr ? p.bias[channel] : 0, p.output + plane * p.points);
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
