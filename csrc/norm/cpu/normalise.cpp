// SPDX-License-Identifier: Apache-2.0
//
// The variance is that of parts, each about its own mean, put together (Chan, Golub and LeVeque 1979): a part stays in
// the first-level cache between the two. With w, b the affine parameters and ρ = 1 / sqrt(variance + epsilon)
//     output = w ρ (x − μ) + b
#include "norm/cpu/column_sums.h"
#include "norm/cpu/kernels.h"
#include "norm/cpu/moments.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr int64_t kPart = 64 * kColumns;  // points

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

Moments moments_of_map(const float* input, int64_t points) {
  Moments moments;
  for (int64_t i = 0; i < points; i += kPart) {
    moments.join(moments_of_part(input + i, smaller_of(kPart, points - i)));
  }
  return moments;
}

void write(const float* input, int64_t points, float mean, float scale, float shift, float* to) {
  const int64_t whole = points / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) math::store(to + i, scale * (math::load<V>(input + i) - mean) + shift);
  for (int64_t i = whole; i < points; ++i) to[i] = scale * (input[i] - mean) + shift;
}

}  // namespace

void norm_moments(const NormProblem& p, int64_t first_map, int64_t last_map) {
  for (int64_t map = first_map; map < last_map; ++map) {
    const Moments moments = moments_of_map(p.input + map * p.sets.points, p.sets.points);
    p.moments[2 * map] = moments.mean;
    p.moments[2 * map + 1] = moments.squares;
  }
}

void norm_statistics(const NormProblem& p, int64_t first_set, int64_t last_set) {
  for (int64_t set = first_set; set < last_set; ++set) {
    Moments moments;
    for (int64_t m = 0; m < p.sets.members; ++m) {
      const double* const part = p.moments + 2 * p.sets.map(set, m);
      moments.join({static_cast<double>(p.sets.points), part[0], part[1]});
    }
    const double squares = moments.squares < 0 ? 0 : moments.squares;  // a constant's may round to less
    p.mean[set] = static_cast<float>(moments.mean);
    p.variance[set] = static_cast<float>(squares / moments.points);
  }
}

void norm_write(const NormProblem& p, int64_t first_map, int64_t last_map) {
  const int64_t points = p.sets.points;
  for (int64_t map = first_map; map < last_map; ++map) {
    const int64_t set = p.sets.set_of(map), channel = map % p.sets.channels;
    const float rstd = inverse_deviation(p.variance[set], p.epsilon);
    const float scale = (p.weight != nullptr ? p.weight[channel] : 1) * rstd;
    const float shift = p.bias != nullptr ? p.bias[channel] : 0;
    write(p.input + map * points, points, p.mean[set], scale, shift, p.output + map * points);
  }
}

void normalise_sets(const NormProblem& p, int64_t first_set, int64_t last_set) {
  for (int64_t set = first_set; set < last_set; ++set) {
    for (int64_t m = 0; m < p.sets.members; ++m) {
      const int64_t map = p.sets.map(set, m);
      norm_moments(p, map, map + 1);
    }
    norm_statistics(p, set, set + 1);
    for (int64_t m = p.sets.members; m-- > 0;) {  // the latest is still in the caches
      const int64_t map = p.sets.map(set, m);
      norm_write(p, map, map + 1);
    }
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
