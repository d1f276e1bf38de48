// SPDX-License-Identifier: Apache-2.0
#include "cpu/buffer.h"
#include "cpu/dispatch.h"
#include "fisher/cpu/kernels.h"
#include "math/sample.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

using math::kBlocksPerGroup;
using math::kDrawsPerGroup;
using math::UInt32V;

constexpr int64_t kLanes = sizeof(UInt32V) / sizeof(uint32_t);
static_assert(kBlocksPerGroup % kLanes == 0, "vectors fill a group");

/// Draws [64 group, 64 (group + 1)) of a key.
TIMM_EXT_FN void draw_group(int64_t group, uint64_t key, float* uniform) {
  UInt32V lanes;
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<uint32_t>(lane);
  for (int64_t first = 0; first < kBlocksPerGroup; first += kLanes) {
    const uint64_t block = static_cast<uint64_t>(group * kBlocksPerGroup + first);
    UInt32V x[math::kDrawsPerBlock];
    math::philox(lanes + static_cast<uint32_t>(block), UInt32V{} + static_cast<uint32_t>(block >> 32), key, x);
    for (int j = 0; j < math::kDrawsPerBlock; ++j) {
      math::store(uniform + j * kBlocksPerGroup + first, math::unit_interval(x[j]));
    }
  }
}

TIMM_EXT_FN void load_to(const float* from, math::FloatV& v) { v = math::load<math::FloatV>(from); }
TIMM_EXT_FN void load_to(const float* from, math::DoubleV& v) { v = math::load_doubles(from); }
TIMM_EXT_FN void load_to(const double* from, math::DoubleV& v) { v = math::load_doubles(from); }
TIMM_EXT_FN void load_to(const float* from, float& v) { v = *from; }
TIMM_EXT_FN void load_to(const float* from, double& v) { v = *from; }
TIMM_EXT_FN void load_to(const double* from, double& v) { v = *from; }

template <class V, class C>
TIMM_EXT_FN V get(const C* from) {
  V v;
  load_to(from, v);
  return v;
}

template <class V, class C>
TIMM_EXT_FN void put_labels(int64_t* labels, V label) {
  if (labels == nullptr) return;
  C values[sizeof(V) / sizeof(C)];
  math::store(values, label);
  for (size_t lane = 0; lane < sizeof(V) / sizeof(C); ++lane) labels[lane] = static_cast<int64_t>(values[lane]);
}

template <class V, class C>
TIMM_EXT_FN void draw_bernoulli(const C* logits, const float* uniform, int64_t* labels, C* scores) {
  const auto draw = math::bernoulli(get<V>(logits), get<V>(uniform));
  math::store(scores, draw.score);
  put_labels<V, C>(labels, draw.label);
}

/// Of voxels that lie `pitch` apart from one class to the next; `weights` has room for a vector of each class.
template <class V, class C>
TIMM_EXT_FN void draw_categorical(const C* logits, const float* uniform, int64_t classes, int64_t pitch, C* weights,
                                  int64_t* labels, C* scores) {
  constexpr int64_t lanes = sizeof(V) / sizeof(C);
  V largest = get<V>(logits);
  for (int64_t k = 1; k < classes; ++k) largest = math::larger(largest, get<V>(logits + k * pitch));
  V total = {};
  for (int64_t k = 0; k < classes; ++k) {
    const V weight = math::exp_of(get<V>(logits + k * pitch) - largest);
    math::store(weights + k * lanes, weight);
    total += weight;
  }
  math::Categorical<V> variable(get<V>(uniform), total);
  for (int64_t k = 0; k < classes; ++k) {
    math::store(scores + k * pitch, variable.next(math::load<V>(weights + k * lanes), k + 1 == classes));
  }
  put_labels<V, C>(labels, variable.label());
}

template <class C>
void sample(const SampleProblem& problem, int64_t first_unit, int64_t last_unit) {
  using V = typename math::VectorOf<C>::type;
  constexpr int64_t lanes = sizeof(V) / sizeof(C);
  const int64_t blocks = block_count(problem.voxels);
  const Buffer<C> weights(problem.classes * lanes);
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t example = unit / blocks, begin = unit % blocks * kBlock;
    const int64_t end = begin + kBlock < problem.voxels ? begin + kBlock : problem.voxels;
    const int64_t offset = example * problem.classes * problem.voxels;
    const C* const logits = static_cast<const C*>(problem.logits) + offset;
    C* const scores = static_cast<C*>(problem.scores) + offset;
    int64_t* const labels = problem.labels ? problem.labels + example * problem.voxels : nullptr;
    float uniform[kDrawsPerGroup];
    const auto draw = [&](auto kind, int64_t v, int64_t at) __attribute__((always_inline)) {
      using W = decltype(kind);
      int64_t* const to = labels ? labels + v : nullptr;
      if (problem.categorical) {
        draw_categorical<W>(logits + v, uniform + at, problem.classes, problem.voxels, weights.get(), to, scores + v);
      } else {
        draw_bernoulli<W>(logits + v, uniform + at, to, scores + v);
      }
    };
    for (int64_t group = begin; group < end; group += kDrawsPerGroup) {
      draw_group(group / kDrawsPerGroup, static_cast<uint64_t>(problem.keys[example]), uniform);
      const int64_t count = end - group < kDrawsPerGroup ? end - group : kDrawsPerGroup;
      int64_t at = 0;
      for (; at + lanes <= count; at += lanes) draw(V{}, group + at, at);
      for (; at < count; ++at) draw(C{}, group + at, at);
    }
  }
}

}  // namespace

void sample_labels(const SampleProblem& problem, int64_t first_unit, int64_t last_unit) {
  if (problem.element == Element::kFloat64) {
    sample<double>(problem, first_unit, last_unit);
  } else {
    sample<float>(problem, first_unit, last_unit);
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
