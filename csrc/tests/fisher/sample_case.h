// SPDX-License-Identifier: Apache-2.0
//
// Cases of sample_labels and the definition of their labels and scores; host code, whatever runs the kernel.
#pragma once

#include <cstdint>
#include <vector>

#include "fisher/problem.h"

namespace timm_ext::test {

struct SampleSpec {
  Element element;  // kFloat32 or kFloat64
  bool categorical;
  int64_t examples, classes, voxels;
  bool labels_wanted;
};

std::vector<SampleSpec> sample_table();

/// Logits and keys drawn from a seed, and room for the results. Logits and scores are raw bytes.
struct SampleCase {
  SampleSpec spec;
  std::vector<unsigned char> logits, scores;
  std::vector<int64_t> keys, labels;

  SampleCase(const SampleSpec& spec, uint64_t seed);
  SampleProblem problem();
  void check_results() const;  // labels outside rounding of a threshold, and all their scores
};

}  // namespace timm_ext::test
