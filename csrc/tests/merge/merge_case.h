// SPDX-License-Identifier: Apache-2.0
//
// One random input of the merge, in storage that ends where the matrices end, and its merge in plain extended
// precision.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "merge/problem.h"
#include "tests/elements.h"

namespace timm_ext::test {

enum class Segments { kOne, kSingle, kKernels, kMixed, kTiles };
enum class FisherKind { kNone, kPlain, kWide, kHalfZero, kDenormal, kZero };

struct CaseSpec {
  Element element;
  int64_t models;
  int64_t elements;
  Segments segments;
  FisherKind fisher;
  int64_t padding = 0;        // of the row stride
  int64_t offset = 0;         // of the first element from a 16-byte boundary
  bool one_gradient = false;  // stride 0
  bool same_theta = false;
  std::string name() const;
};

struct Reference {
  std::vector<double> merged;            // [P]
  std::vector<double> magnitude;         // [P] Σ w |θ| / Σ w
  std::vector<double> rows;              // [S, T] gradient of the log-weights
  std::vector<double> rows_magnitude;    // [S, T] Σ |g| w_t / Σ w (max θ - min θ)
  std::vector<double> theta;             // [T, P] gradient
  std::vector<double> fisher;            // [T, P] gradient
  std::vector<double> fisher_magnitude;  // [T, P] α_t / Σ w (max θ - min θ), bounds the slope
};

class MergeCase {
 public:
  MergeCase(const CaseSpec& spec, uint64_t seed);

  CaseSpec spec;
  std::string name;
  std::vector<int64_t> offsets;
  Buffer theta;
  Buffer fisher;
  Buffer log_weight;  // double for kFloat64, else float
  Buffer gradient;
  MergeInputs inputs;
  MergeGradient upstream;

  Element log_element() const { return spec.element == Element::kFloat64 ? Element::kFloat64 : Element::kFloat32; }
  int64_t segments() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t stride() const { return spec.elements + spec.padding; }
  Reference reference() const;

 private:
  void reference_element(int64_t segment, int64_t p, Reference& r) const;
};

}  // namespace timm_ext::test
