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

#include "../cuda/merge_tile.h"
#include "check.h"
#include "merge_case.h"

namespace {

using namespace timm_ext::test;
using timm_ext::cuda::MergePlaneGradients;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

Buffer forward(const MergeCase& c) {
  Buffer merged(c.spec.element, c.spec.elements, c.spec.offset);
  check(timm_ext::cuda::merge_forward(c.inputs, merged.data(), nullptr) == 0, "forward failed");
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

void check_forward(const MergeCase& c, const Reference& truth) {
  const Buffer merged = forward(c);
  const Element e = c.spec.element;
  const double bound = std::max<double>(8, 1.6 * c.spec.models) * arithmetic_rounding(e);
  for (int64_t p = 0; p < c.spec.elements; ++p) {
    const double value = decode(e, merged.data(), p);
    const double allowed =
        bound * truth.magnitude[p] + storage_rounding(e) * std::abs(truth.merged[p]) + storage_step(e);
    check(std::abs(value - truth.merged[p]) <= allowed, "%s: merged[%ld] is %.9g, truth %.9g", c.name.c_str(),
          static_cast<long>(p), value, truth.merged[p]);
  }
}

void check_rows(const MergeCase& c, const Reference& truth) {
  const Buffer rows = backward_rows(c);
  const double bound = c.spec.element == Element::kFloat64 ? 1e-14 : 5e-6;
  for (int64_t i = 0; i < c.segments() * c.spec.models; ++i) {
    const double value = decode(c.log_element(), rows.data(), i);
    check(std::abs(value - truth.rows[i]) <= bound * truth.rows_magnitude[i] + 1e-36,
          "%s: row %ld of log-weight gradient is %.9g, truth %.9g", c.name.c_str(), static_cast<long>(i), value,
          truth.rows[i]);
  }
}

void check_planes(const MergeCase& c, const Reference& truth) {
  const Element e = c.spec.element;
  const int64_t stride = c.stride() + 3;
  const int64_t count = (c.spec.models - 1) * stride + c.spec.elements;
  Buffer theta(e, count), fisher(e, count);
  const MergePlaneGradients outputs = {theta.data(), c.inputs.fisher ? fisher.data() : nullptr, stride, stride};
  check(timm_ext::cuda::merge_backward_planes(c.inputs, c.upstream, outputs, nullptr) == 0, "planes failed");
  const double bound = 16 * arithmetic_rounding(e) + storage_rounding(e);
  const double underflow = 1e-36;  // of w, which is scaled to [0.5, 1) for the largest F
  const double largest = e == Element::kFloat16 ? 65504 : e == Element::kFloat64 ? 1e308 : 3.38e38;
  for (int64_t t = 0; t < c.spec.models; ++t) {
    for (int64_t p = 0; p < c.spec.elements; ++p) {
      const int64_t i = t * c.spec.elements + p;
      const double value = decode(e, theta.data(), t * stride + p);
      check(std::abs(value - truth.theta[i]) <= bound * std::abs(truth.theta[i]) + storage_step(e) + underflow,
            "%s: theta gradient [%ld, %ld] is %.9g, truth %.9g", c.name.c_str(), static_cast<long>(t),
            static_cast<long>(p), value, truth.theta[i]);
      if (!c.inputs.fisher || truth.fisher_magnitude[i] > largest) continue;
      const double slope = decode(e, fisher.data(), t * stride + p);
      const double allowed = 16 * arithmetic_rounding(e) * truth.fisher_magnitude[i] +
                             storage_rounding(e) * std::abs(truth.fisher[i]) + storage_step(e);
      check(std::abs(slope - truth.fisher[i]) <= allowed, "%s: Fisher gradient [%ld, %ld] is %.9g, truth %.9g",
            c.name.c_str(), static_cast<long>(t), static_cast<long>(p), slope, truth.fisher[i]);
    }
  }
}

void check_case(const CaseSpec& spec, uint64_t seed) {
  timm_ext::executor::set_seed(seed);
  const MergeCase c(spec, seed);
  const Reference truth = c.reference();
  check_forward(c, truth);
  check_rows(c, truth);
  if (spec.elements <= 600) check_planes(c, truth);
}

/// Every element type and instance of T, over kinds of segments and Fishers that rotate.
void test_table() {
  const Segments segments[] = {Segments::kKernels, Segments::kMixed, Segments::kOne, Segments::kTiles,
                               Segments::kSingle};
  const FisherKind fishers[] = {FisherKind::kPlain, FisherKind::kWide, FisherKind::kNone, FisherKind::kHalfZero,
                                FisherKind::kDenormal};
  const int64_t sizes[] = {1, 27, 129, 512, 1151, 2048, 3001};
  uint64_t i = 0;
  for (Element element : kElements) {
    for (int64_t models : {1, 2, 3, 4, 5, 6, 11, 17}) {
      for (int64_t size : sizes) {
        const bool one_per_lane = element == Element::kFloat64 || models == 17;  // slow here: a barrier per segment
        CaseSpec spec = {element, models, one_per_lane ? std::min<int64_t>(size, 700) : size, segments[i % 5],
                         fishers[(i / 2 + i / 5) % 5]};
        spec.padding = i % 4 == 1 ? 5 : i % 4 == 2 ? -size & 63 : 0;
        spec.offset = i % 7 == 3 ? 1 : 0;
        spec.one_gradient = i % 6 == 5;
        check_case(spec, ++i);
      }
    }
  }
}

/// Every kind of segment with every kind of Fisher at the size of a few tiles.
void test_kinds() {
  uint64_t seed = 1000;
  for (Segments segments :
       {Segments::kOne, Segments::kSingle, Segments::kKernels, Segments::kMixed, Segments::kTiles}) {
    for (FisherKind fisher :
         {FisherKind::kNone, FisherKind::kPlain, FisherKind::kWide, FisherKind::kHalfZero, FisherKind::kDenormal}) {
      check_case({Element::kFloat32, 3, 1999, segments, fisher}, ++seed);
    }
  }
}

/// Segments over so many tiles that a whole block adds them up, beside short ones.
void test_long_chains() {
  check_case({Element::kFloat64, 2, 128 * 300 + 5, Segments::kOne, FisherKind::kPlain}, 2000);
  check_case({Element::kFloat32, 2, 512 * 280 + 5, Segments::kOne, FisherKind::kPlain}, 2001);
}

void test_same_bits_under_other_schedules() {
  uint64_t seed = 3000;
  for (Element element : kElements) {
    for (Segments segments : {Segments::kMixed, Segments::kKernels}) {
      const MergeCase c({element, 3, 2600, segments, FisherKind::kWide}, ++seed);
      timm_ext::executor::set_seed(0);
      const Buffer merged = forward(c), rows = backward_rows(c);
      for (uint64_t schedule = 1; schedule < 4; ++schedule) {
        timm_ext::executor::set_seed(schedule);
        const Buffer again = forward(c), rows_again = backward_rows(c);
        check(std::memcmp(merged.data(), again.data(), merged.size()) == 0, "merged depends on the schedule");
        check(std::memcmp(rows.data(), rows_again.data(), rows.size()) == 0, "gradient depends on the schedule");
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
  for (int64_t models : {2, 17}) {
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
  timm_ext::cuda::MergeInputs in = {};
  in.models = 3;
  const int64_t before = timm_ext::executor::launches();
  check(timm_ext::cuda::merge_forward(in, nullptr, nullptr) == 0, "empty forward");
  check(timm_ext::cuda::merge_backward_log_weight(in, {}, nullptr, nullptr, nullptr) == 0, "empty backward");
  check(timm_ext::cuda::merge_backward_planes(in, {}, {}, nullptr) == 0, "empty planes");
  check(timm_ext::executor::launches() == before, "an empty merge launches nothing");
}

void test_tiling() {
  for (int64_t elements = 1; elements < int64_t{1} << 42; elements = elements * 3 + 1) {
    for (int row : {32, 128, 256}) {
      const auto tiling = timm_ext::cuda::tiling_of(elements, row);
      const int64_t covered = tiling.tiles * tiling.length;
      check(covered >= elements && covered - tiling.length < elements, "tiles do not cover P exactly once");
      check(tiling.length % row == 0 && tiling.length >= 4 * row && tiling.length <= 32 * row, "length of a tile");
    }
  }
}

}  // namespace

int main() {
  test_table();
  test_kinds();
  test_long_chains();
  test_same_bits_under_other_schedules();
  test_equal_models();
  test_special_log_weights();
  test_empty();
  test_tiling();
  return result();
}
