// SPDX-License-Identifier: Apache-2.0
//
// One random input of the merge, in storage that ends where the planes end, and its merge in plain extended precision.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../cuda/merge.h"

namespace timm_ext::test {

using cuda::Element;

constexpr Element kElements[] = {Element::kFloat32, Element::kBFloat16, Element::kFloat16, Element::kFloat64};

int element_bytes(Element element);
double decode(Element element, const void* values, int64_t i);
void encode(Element element, void* values, int64_t i, double value);
/// The largest relative error of rounding to the storage type; 0 where the arithmetic type is stored.
double storage_rounding(Element element);
/// The step of the smallest numbers of the storage type.
double storage_step(Element element);
/// 2^-24 or 2^-53.
double arithmetic_rounding(Element element);

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

/// A block of elements that AddressSanitizer guards at both ends, after `offset` elements; filled with NaN.
class Buffer {
 public:
  Buffer(Element element, int64_t count, int64_t offset = 0);
  void* data() { return bytes_.get() + offset_bytes_; }
  const void* data() const { return bytes_.get() + offset_bytes_; }
  size_t size() const { return size_; }

 private:
  size_t offset_bytes_;
  size_t size_;
  std::unique_ptr<unsigned char[]> bytes_;
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
  cuda::MergeInputs inputs;
  cuda::MergeGradient upstream;

  Element log_element() const { return spec.element == Element::kFloat64 ? Element::kFloat64 : Element::kFloat32; }
  int64_t segments() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t stride() const { return spec.elements + spec.padding; }
  Reference reference() const;

 private:
  void reference_element(int64_t segment, int64_t p, Reference& r) const;
};

}  // namespace timm_ext::test
