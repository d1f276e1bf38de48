// SPDX-License-Identifier: Apache-2.0
//
// The generator against its published numbers, and the CUDA sample_labels kernel, run by the host executor, against
// the definition of its labels and scores.
#include <cuda_runtime.h>

#include <cmath>
#include <random>
#include <vector>

#include "../cuda/sample_labels.h"
#include "../math/sample.h"
#include "check.h"

namespace {

using namespace timm_ext;
using cuda::Element;
using cuda::SampleProblem;
using test::check;

/// Known answers of the Random123 library for Philox 4x32-10; here the upper half of the counter is always 0.
void test_philox() {
  uint32_t x[4];
  math::philox(0u, 0u, 0, x);
  check(x[0] == 0x6627e8d5 && x[1] == 0xe169c58d && x[2] == 0xbc57ac4c && x[3] == 0x9b00dbd8, "philox of zeros");
}

void test_exp() {
  for (float x = 0; x > -87; x -= 0.00371f) {
    const double truth = std::exp(static_cast<double>(x));
    check(std::abs(math::exp_nonpositive_float(x) - truth) <= 1.5e-7 * truth, "exp(%g)", static_cast<double>(x));
  }
  const float infinity = INFINITY;
  check(math::exp_nonpositive_float(0.0f) == 1 && math::exp_nonpositive_float(-infinity) == 0, "exp at its ends");
  check(math::exp_nonpositive_float(-87.5f) == 0 && std::isnan(math::exp_nonpositive_float(NAN)), "exp at its ends");
}

/// The draw of a place, taken from the generator's definition.
double uniform_of(int64_t key, int64_t place) {
  const int64_t group = place / 64, within = place % 64;
  const uint64_t block = static_cast<uint64_t>(group * 16 + within % 16);
  uint32_t x[4];
  math::philox(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), static_cast<uint64_t>(key), x);
  return (x[within / 16] >> 8) / 16777216.0;
}

template <class C>
void check_case(bool categorical, int64_t examples, int64_t classes, int64_t voxels, bool labels_wanted) {
  std::mt19937_64 random(static_cast<uint64_t>(classes * voxels));
  std::normal_distribution<double> normal(0, 4);
  std::vector<C> logits(examples * classes * voxels), scores(logits.size(), C(99));
  for (C& z : logits) z = static_cast<C>(normal(random));
  std::vector<int64_t> keys(examples), labels(examples * voxels, -1);
  for (int64_t& key : keys) key = static_cast<int64_t>(random());
  const SampleProblem problem{logits.data(),
                              keys.data(),
                              labels_wanted ? labels.data() : nullptr,
                              scores.data(),
                              sizeof(C) == 8 ? Element::kFloat64 : Element::kFloat32,
                              categorical,
                              examples,
                              classes,
                              voxels};
  check(cuda::sample_labels(problem, nullptr) == 0, "launch failed");
  const double tolerance = sizeof(C) == 8 ? 1e-14 : 1e-6;
  for (int64_t b = 0; b < examples; ++b) {
    for (int64_t v = 0; v < voxels; ++v) {
      const double u = uniform_of(keys[b], v);
      std::vector<double> share(classes);
      double largest = -INFINITY, total = 0;
      const auto z = [&](int64_t k) { return static_cast<double>(logits[(b * classes + k) * voxels + v]); };
      for (int64_t k = 0; k < classes; ++k) largest = std::max(largest, z(k));
      for (int64_t k = 0; k < classes; ++k) total += share[k] = std::exp(z(k) - largest);
      double reached = 0, distance = 1;
      int64_t drawn = categorical ? classes - 1 : 0;
      for (int64_t k = 0; k < classes; ++k) share[k] /= total;
      if (!categorical) {
        share[0] = 1 / (1 + std::exp(-z(0)));
        drawn = u < share[0];
        distance = std::abs(u - share[0]);
      }
      for (int64_t k = 0; categorical && k + 1 < classes; ++k) {
        reached += share[k];
        distance = std::min(distance, std::abs(u - reached));
        if (u < reached && drawn == classes - 1) drawn = k;
      }
      if (distance < tolerance) continue;  // within rounding of the threshold
      if (labels_wanted) check(labels[b * voxels + v] == drawn, "label %d of %d", int(v), int(voxels));
      for (int64_t k = 0; k < classes; ++k) {
        const double one = categorical ? drawn == k : drawn, value = scores[(b * classes + k) * voxels + v];
        check(std::abs(value - (one - share[k])) <= tolerance, "score %.9g, truth %.9g", value, one - share[k]);
      }
    }
  }
  if (!labels_wanted) check(labels[0] == -1, "labels were written");
}

}  // namespace

int main() {
  test_philox();
  test_exp();
  for (int64_t voxels : {1, 15, 16, 63, 64, 65, 200, 1000}) {
    for (bool wanted : {true, false}) {
      check_case<float>(false, 2, 1, voxels, wanted);
      check_case<double>(false, 3, 1, voxels, wanted);
      for (int64_t classes : {1, 2, 5}) {
        check_case<float>(true, 2, classes, voxels, wanted);
        check_case<double>(true, 1, classes, voxels, wanted);
      }
    }
  }
  return test::result();
}
