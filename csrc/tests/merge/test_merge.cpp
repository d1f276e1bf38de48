// SPDX-License-Identifier: Apache-2.0
//
// The CUDA merge kernels, run by the host executor, against a plain merge in extended precision; and the same bits
// under other schedules.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "merge/cuda/launchers.h"
#include "merge/cuda/tile.h"
#include "tests/check.h"
#include "tests/merge/merge_case.h"
#include "tests/merge/merge_check.h"

namespace {

using namespace timm_ext::test;
using timm_ext::MergeMatrixGradients;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

Buffer forward(const MergeCase& c) {
  Buffer merged(c.spec.element, c.spec.elements, c.spec.offset);
  const int64_t before = timm_ext::executor::launches();
  const int error = timm_ext::cuda::merge_forward(c.inputs, merged.data(), nullptr);
  check(error == 0 && timm_ext::executor::launches() - before == 1, "forward failed or took more than one launch");
  return merged;
}

Buffer backward_rows(const MergeCase& c) {
  const size_t bytes = timm_ext::cuda::merge_backward_workspace_bytes(c.spec.models, c.spec.elements, c.spec.element);
  Buffer workspace(Element::kFloat64, static_cast<int64_t>(bytes / 8));
  Buffer rows(c.log_element(), c.segments() * c.spec.models);
  const int64_t before = timm_ext::executor::launches();
  const int error =
      timm_ext::cuda::merge_backward_log_weight(c.inputs, c.upstream, rows.data(), workspace.data(), nullptr);
  check(error == 0 && timm_ext::executor::launches() - before <= 2, "backward failed or took more than two launches");
  return rows;
}

void check_case(const CaseSpec& spec, uint64_t seed) {
  timm_ext::executor::set_seed(seed);
  const MergeCase c(spec, seed);
  const Reference truth = c.reference();
  check_merged(c, truth, forward(c).data());
  check_rows(c, truth, backward_rows(c).data());
  if (spec.elements > 1200) return;
  const int64_t stride = c.stride() + 3;
  const int64_t count = (spec.models - 1) * stride + spec.elements;
  Buffer theta(spec.element, count), fisher(spec.element, count);
  const MergeMatrixGradients outputs = {theta.data(), c.inputs.fisher ? fisher.data() : nullptr, stride, stride};
  check(timm_ext::cuda::merge_backward_matrices(c.inputs, c.upstream, outputs, nullptr) == 0, "matrices failed");
  check_matrices(c, truth, outputs);
}

void test_table() {
  uint64_t seed = 0;
  for (const CaseSpec& spec : case_table()) check_case(spec, ++seed);
}

/// Segments over so many tiles that a whole block adds them up, beside short ones.
void test_long_chains() {
  check_case({Element::kFloat64, 2, 128 * 300 + 5, Segments::kOne, FisherKind::kPlain}, 2000);
  check_case({Element::kFloat32, 2, 512 * 280 + 5, Segments::kOne, FisherKind::kPlain}, 2001);
  check_case({Element::kBFloat16, 12, 512 * 40 + 3, Segments::kOne, FisherKind::kHalfZero}, 2002);
}

bool same_bits(const Buffer& a, const Buffer& b) { return std::memcmp(a.data(), b.data(), a.size()) == 0; }

void test_same_bits_under_other_schedules() {
  uint64_t seed = 3000;
  for (Element element : kElements) {
    for (int64_t models : {2, 3, 8, 16}) {
      for (Segments segments : {Segments::kMixed, Segments::kKernels}) {
        const MergeCase c({element, models, 2600 / models + 500, segments, FisherKind::kWide}, ++seed);
        timm_ext::executor::set_seed(0);
        const Buffer merged = forward(c), rows = backward_rows(c);
        for (uint64_t schedule = 1; schedule < 3; ++schedule) {
          timm_ext::executor::set_seed(schedule);
          check(same_bits(merged, forward(c)), "%s: merged depends on the schedule", c.name.c_str());
          check(same_bits(rows, backward_rows(c)), "%s: gradient depends on the schedule", c.name.c_str());
        }
      }
    }
  }
}

/// Matrices that start or lie off a vector are read element by element; nothing else changes.
void test_same_bits_under_other_alignments() {
  for (Element element : kElements) {
    for (int64_t models : {2, 5, 8, 16}) {
      CaseSpec spec = {element, models, 1300, Segments::kMixed, FisherKind::kHalfZero};
      const MergeCase aligned(spec, 3500);
      const Buffer merged = forward(aligned), rows = backward_rows(aligned);
      for (int64_t offset : {0, 1, 3}) {
        spec.offset = offset;
        spec.padding = offset == 1 ? 12 : 7;
        const MergeCase other(spec, 3500);
        check(same_bits(merged, forward(other)), "%s: merged depends on the alignment", other.name.c_str());
        check(same_bits(rows, backward_rows(other)), "%s: gradient depends on the alignment", other.name.c_str());
      }
    }
  }
}

/// Where all models agree the merge is exact and the gradient exactly 0.
void test_equal_models() {
  for (Element element : kElements) {
    CaseSpec spec = {element, 5, 700, Segments::kMixed, FisherKind::kWide};
    spec.same_theta = true;
    const MergeCase c(spec, 4000);
    const Buffer merged = forward(c), rows = backward_rows(c);
    check(std::memcmp(merged.data(), c.theta.data(), merged.size()) == 0, "%s: not exact", c.name.c_str());
    for (int64_t i = 0; i < c.segments() * 5; ++i) {
      check(decode(c.log_element(), rows.data(), i) == 0, "%s: gradient not 0", c.name.c_str());
    }
  }
}

/// A model with log-weight -inf has no part in the merge, whatever its Fisher; a NaN log-weight shows in its segment.
void test_special_log_weights() {
  for (int64_t models : {2, 9, 17}) {
    MergeCase c({Element::kFloat32, models, 600, Segments::kTiles, FisherKind::kPlain}, 5000);
    for (int64_t s = 0; s < c.segments(); ++s) {
      for (int64_t t = 0; t < models; ++t) {
        encode(Element::kFloat32, c.log_weight.data(), s * models + t, t == 1 ? 0 : -INFINITY);
      }
    }
    for (int64_t p = 0; p < 600; ++p) encode(Element::kFloat32, c.fisher.data(), p, 3e38);
    const Buffer merged = forward(c);
    const auto* second = static_cast<const unsigned char*>(c.theta.data()) + c.stride() * 4;
    check(std::memcmp(merged.data(), second, merged.size()) == 0, "a model without weight changes the merge");
    encode(Element::kFloat32, c.log_weight.data(), 0, kNaN);
    const Buffer poisoned = forward(c);
    for (int64_t p = 0; p < 600; ++p) {
      const bool inside = p < c.offsets[1];
      check(std::isnan(decode(Element::kFloat32, poisoned.data(), p)) == inside, "NaN log-weight at %d", int(p));
    }
  }
}

void test_empty() {
  timm_ext::MergeInputs in = {};
  in.models = 3;
  const int64_t before = timm_ext::executor::launches();
  check(timm_ext::cuda::merge_forward(in, nullptr, nullptr) == 0, "empty forward");
  check(timm_ext::cuda::merge_backward_log_weight(in, {}, nullptr, nullptr, nullptr) == 0, "empty backward");
  check(timm_ext::cuda::merge_backward_matrices(in, {}, {}, nullptr) == 0, "empty matrices");
  check(timm_ext::executor::launches() == before, "an empty merge launches nothing");
}

void test_tiling() {
  for (int64_t elements = 1; elements < int64_t{1} << 42; elements = elements * 3 + 1) {
    for (int row : {32, 64, 128, 256}) {
      const auto tiling = timm_ext::cuda::tiling_of(elements, row);
      const int64_t covered = tiling.tiles * tiling.length;
      check(covered >= elements && covered - tiling.length < elements, "tiles do not cover P exactly once");
      check(tiling.length % row == 0 && tiling.length >= 4 * row && tiling.length <= 16 * row, "length of a tile");
    }
  }
}

}  // namespace

int main() {
  test_table();
  test_long_chains();
  test_same_bits_under_other_schedules();
  test_same_bits_under_other_alignments();
  test_equal_models();
  test_special_log_weights();
  test_empty();
  test_tiling();
  return result();
}
