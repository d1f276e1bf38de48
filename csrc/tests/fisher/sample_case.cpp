// SPDX-License-Identifier: Apache-2.0
#include "tests/fisher/sample_case.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "math/philox.h"
#include "tests/check.h"
#include "tests/elements.h"

namespace timm_ext::test {
namespace {

/// The draw of a place, taken from the generator's definition.
double uniform_of(int64_t key, int64_t place) {
  const int64_t group = place / 64, within = place % 64;
  const uint64_t block = static_cast<uint64_t>(group * 16 + within % 16);
  uint32_t x[4];
  math::philox(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), static_cast<uint64_t>(key), x);
  return (x[within / 16] >> 8) / 16777216.0;
}

/// One variable: its probabilities, the label that a draw gives, and how far the draw is from giving another one.
struct Variable {
  std::vector<double> share;
  int64_t label = 0;
  double distance = 1;

  Variable(const std::vector<double>& z, bool categorical, double u) {
    if (!categorical) {
      share = {1 / (1 + std::exp(-z[0]))};
      label = u < share[0];
      distance = std::abs(u - share[0]);
      return;
    }
    const double largest = *std::max_element(z.begin(), z.end());
    double total = 0, reached = 0;
    for (double value : z) total += std::exp(value - largest);
    for (double value : z) share.push_back(std::exp(value - largest) / total);
    for (size_t k = 0; k + 1 < z.size(); ++k) {
      reached += share[k];
      label += reached <= u;
      distance = std::min(distance, std::abs(u - reached));
    }
  }
};

}  // namespace

std::vector<SampleSpec> sample_table() {
  std::vector<SampleSpec> table;
  for (int64_t voxels : {1, 15, 16, 63, 64, 65, 200, 1000}) {
    for (bool wanted : {true, false}) {
      table.push_back({Element::kFloat32, false, 2, 1, voxels, wanted});
      table.push_back({Element::kFloat64, false, 3, 1, voxels, wanted});
      for (int64_t classes : {1, 2, 5}) {
        table.push_back({Element::kFloat32, true, 2, classes, voxels, wanted});
        table.push_back({Element::kFloat64, true, 1, classes, voxels, wanted});
      }
    }
  }
  return table;
}

SampleCase::SampleCase(const SampleSpec& spec, uint64_t seed)
    : spec(spec),
      logits(spec.examples * spec.classes * spec.voxels * element_bytes(spec.element)),
      scores(logits.size()),
      labels(spec.examples * spec.voxels, -1) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal(0, 4);
  for (int64_t i = 0; i < spec.examples * spec.classes * spec.voxels; ++i) {
    encode(spec.element, logits.data(), i, normal(random));
  }
  for (int64_t b = 0; b < spec.examples; ++b) keys.push_back(static_cast<int64_t>(random()));
}

SampleProblem SampleCase::problem() {
  return {logits.data(), keys.data(),  spec.labels_wanted ? labels.data() : nullptr,
          scores.data(), spec.element, spec.categorical,
          spec.examples, spec.classes, spec.voxels};
}

void SampleCase::check_results() const {
  const double tolerance = spec.element == Element::kFloat64 ? 1e-14 : 1e-6;
  for (int64_t b = 0; b < spec.examples; ++b) {
    for (int64_t v = 0; v < spec.voxels; ++v) {
      const auto place = [&](int64_t k) { return (b * spec.classes + k) * spec.voxels + v; };
      std::vector<double> z;
      for (int64_t k = 0; k < spec.classes; ++k) z.push_back(decode(spec.element, logits.data(), place(k)));
      const Variable truth(z, spec.categorical, uniform_of(keys[b], v));
      if (truth.distance < tolerance) continue;
      const int64_t label = labels[b * spec.voxels + v];
      check(label == (spec.labels_wanted ? truth.label : -1), "label %d of %d: %d", int(v), int(spec.voxels),
            int(label));
      for (int64_t k = 0; k < spec.classes; ++k) {
        const double one = spec.categorical ? truth.label == k : static_cast<double>(truth.label);
        const double value = decode(spec.element, scores.data(), place(k)), expected = one - truth.share[k];
        check(std::abs(value - expected) <= tolerance, "score %.9g, truth %.9g", value, expected);
      }
    }
  }
}

}  // namespace timm_ext::test
