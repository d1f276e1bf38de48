// SPDX-License-Identifier: Apache-2.0
#include "tests/merge/merge_check.h"

#include <algorithm>
#include <cmath>

#include "tests/check.h"

namespace timm_ext::test {

std::vector<CaseSpec> case_table() {
  const Segments segments[] = {Segments::kKernels, Segments::kMixed, Segments::kOne, Segments::kTiles,
                               Segments::kSingle};
  const FisherKind fishers[] = {FisherKind::kPlain,    FisherKind::kWide,     FisherKind::kNone,
                                FisherKind::kHalfZero, FisherKind::kDenormal, FisherKind::kZero};
  std::vector<CaseSpec> cases;
  for (Element element : kElements) {
    for (int64_t models = 1; models <= 18; ++models) {
      for (int64_t size : {1, 27, 129, 512, 1151, 2600}) {
        const size_t i = cases.size();
        CaseSpec spec = {element, models, size, segments[i % 5], fishers[(i / 5 + models) % 6]};
        if (spec.models > 16 || element == Element::kFloat64) {  // slow in the executor
          spec.elements = std::min<int64_t>(size, 400);
        } else if (models > 5) {
          spec.elements = std::min<int64_t>(size, 1600);
        }
        spec.padding = i % 4 == 1 ? 5 : i % 4 == 2 ? -size & 63 : 0;
        spec.offset = i % 7 == 3 ? 1 + i % 3 : 0;
        spec.one_gradient = i % 6 == 5;
        cases.push_back(spec);
      }
    }
  }
  for (Segments kind : segments) {
    for (FisherKind fisher : fishers) cases.push_back({Element::kFloat32, 3, 1999, kind, fisher});
  }
  return cases;
}

void check_merged(const MergeCase& c, const Reference& truth, const void* merged) {
  const Element e = c.spec.element;
  const double bound = std::max<double>(8, 1.6 * c.spec.models) * arithmetic_rounding(e);
  for (int64_t p = 0; p < c.spec.elements; ++p) {
    const double value = decode(e, merged, p);
    const double allowed =
        bound * truth.magnitude[p] + storage_rounding(e) * std::abs(truth.merged[p]) + storage_step(e);
    check(std::abs(value - truth.merged[p]) <= allowed, "%s: merged[%ld] is %.9g, truth %.9g", c.name.c_str(),
          static_cast<long>(p), value, truth.merged[p]);
  }
}

void check_rows(const MergeCase& c, const Reference& truth, const void* rows) {
  const double bound = c.spec.element == Element::kFloat64 ? 1e-14 : 5e-6;
  for (int64_t i = 0; i < c.segments() * c.spec.models; ++i) {
    const double value = decode(c.log_element(), rows, i);
    check(std::abs(value - truth.rows[i]) <= bound * truth.rows_magnitude[i] + 1e-36,
          "%s: entry %ld of the log-weight gradient is %.9g, truth %.9g", c.name.c_str(), static_cast<long>(i), value,
          truth.rows[i]);
  }
}

void check_matrices(const MergeCase& c, const Reference& truth, const MergeMatrixGradients& outputs) {
  const Element e = c.spec.element;
  const double unit = 16 * arithmetic_rounding(e);
  const double stored = storage_rounding(e);
  const double underflow = 1e-36;  // of w, which is scaled to [0.5, 1) for the largest F
  const double largest = e == Element::kFloat16 ? 65504 : e == Element::kFloat64 ? 1e308 : 3.38e38;
  for (int64_t t = 0; t < c.spec.models; ++t) {
    for (int64_t p = 0; p < c.spec.elements; ++p) {
      const int64_t i = t * c.spec.elements + p;
      const double theta = decode(e, outputs.theta, t * outputs.theta_stride + p);
      check(
          std::abs(theta - truth.theta[i]) <= (unit + stored) * std::abs(truth.theta[i]) + storage_step(e) + underflow,
          "%s: theta gradient [%ld, %ld] is %.9g, truth %.9g", c.name.c_str(), static_cast<long>(t),
          static_cast<long>(p), theta, truth.theta[i]);
      if (!outputs.fisher || truth.fisher_magnitude[i] > largest) continue;  // no slope, or none that can be stored
      const double slope = decode(e, outputs.fisher, t * outputs.fisher_stride + p);
      const double allowed = unit * truth.fisher_magnitude[i] + stored * std::abs(truth.fisher[i]) + storage_step(e);
      check(std::abs(slope - truth.fisher[i]) <= allowed, "%s: Fisher gradient [%ld, %ld] is %.9g, truth %.9g",
            c.name.c_str(), static_cast<long>(t), static_cast<long>(p), slope, truth.fisher[i]);
    }
  }
}

}  // namespace timm_ext::test
