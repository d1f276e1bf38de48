// SPDX-License-Identifier: Apache-2.0
#include "tests/merge/merge_case.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

namespace timm_ext::test {
namespace {

double uniform(std::mt19937_64& random) { return static_cast<double>(random() >> 11) * 0x1p-53; }

std::vector<int64_t> make_offsets(Segments kind, int64_t elements, std::mt19937_64& random) {
  std::vector<int64_t> offsets = {0};
  while (offsets.back() < elements) {
    int64_t length = elements;
    if (kind == Segments::kSingle) length = 1;
    if (kind == Segments::kKernels) length = 27;
    if (kind == Segments::kMixed) length = 1 + static_cast<int64_t>(1500 * std::pow(uniform(random), 6));
    if (kind == Segments::kTiles) length = 512 * (1 + static_cast<int64_t>(random() % 3));
    offsets.push_back(std::min(elements, offsets.back() + length));
  }
  return offsets;
}

double draw_fisher(FisherKind kind, Element element, std::mt19937_64& random) {
  const double u = uniform(random);
  const bool narrow = element == Element::kFloat16;
  switch (kind) {
    case FisherKind::kWide:
      return narrow ? std::pow(10.0, -7 + 11 * u) : std::pow(10.0, -41 + 79 * u);
    case FisherKind::kHalfZero:
      return uniform(random) < 0.5 ? 0.0 : u + 0.01;
    case FisherKind::kDenormal:
      return (narrow ? 1e-6 : 1e-40) * u;
    case FisherKind::kZero:
      return 0.0;
    default:
      return u + 0.01;
  }
}

}  // namespace

std::string CaseSpec::name() const {
  const char* const elements_names[] = {"float32", "bfloat16", "float16", "float64"};
  const char* const segment_names[] = {"one", "single", "kernels", "mixed", "tiles"};
  const char* const fisher_names[] = {"none", "plain", "wide", "half zero", "denormal", "zero"};
  std::string text = std::string(elements_names[static_cast<int>(element)]) + " T=" + std::to_string(models) +
                     " P=" + std::to_string(elements) + " segments=" + segment_names[static_cast<int>(segments)] +
                     " fisher=" + fisher_names[static_cast<int>(fisher)] + " padding=" + std::to_string(padding) +
                     " offset=" + std::to_string(offset);
  if (one_gradient) text += " one gradient";
  if (same_theta) text += " same theta";
  return text;
}

MergeCase::MergeCase(const CaseSpec& spec_, uint64_t seed)
    : spec(spec_),
      name(spec.name()),
      offsets([&] {
        std::mt19937_64 random(seed);
        return make_offsets(spec.segments, spec.elements, random);
      }()),
      theta(spec.element, (spec.models - 1) * stride() + spec.elements, spec.offset),
      fisher(spec.element, (spec.models - 1) * stride() + spec.elements, spec.offset),
      log_weight(log_element(), segments() * spec.models),
      gradient(spec.element, spec.one_gradient ? 1 : spec.elements, spec.one_gradient ? 0 : spec.offset) {
  std::mt19937_64 random(seed + 1);
  for (int64_t p = 0; p < spec.elements; ++p) {
    const double shared = 2 * uniform(random) - 1;
    for (int64_t t = 0; t < spec.models; ++t) {
      const double own = spec.same_theta ? 0 : 0.3 * (2 * uniform(random) - 1);
      encode(spec.element, theta.data(), t * stride() + p, shared + own);
      encode(spec.element, fisher.data(), t * stride() + p, draw_fisher(spec.fisher, spec.element, random));
    }
  }
  for (int64_t i = 0; i < segments() * spec.models; ++i) {
    const bool none = i % spec.models != 0 && uniform(random) < 0.1;  // a model without weight
    const double value = none ? -std::numeric_limits<double>::infinity() : -4 * uniform(random);
    encode(log_element(), log_weight.data(), i, value);
  }
  for (int64_t p = 0; p < (spec.one_gradient ? 1 : spec.elements); ++p) {
    encode(spec.element, gradient.data(), p, 2 * uniform(random) - 1);
  }
  inputs = {theta.data(),      spec.fisher == FisherKind::kNone ? nullptr : fisher.data(),
            log_weight.data(), offsets.data(),
            stride(),          stride(),
            segments(),        spec.models,
            spec.elements,     spec.element};
  upstream = {gradient.data(), spec.one_gradient ? 0 : 1};
}

Reference MergeCase::reference() const {
  Reference r;
  const int64_t matrices = spec.models * spec.elements;
  const int64_t rows = segments() * spec.models;
  for (auto* values : {&r.merged, &r.magnitude}) values->assign(spec.elements, 0.0);
  for (auto* values : {&r.rows, &r.rows_magnitude}) values->assign(rows, 0.0);
  for (auto* values : {&r.theta, &r.fisher, &r.fisher_magnitude}) values->assign(matrices, 0.0);
  for (int64_t s = 0; s < segments(); ++s) {
    for (int64_t p = offsets[s]; p < offsets[s + 1]; ++p) reference_element(s, p, r);
  }
  return r;
}

/// Everything relative to model 0, in the widest type: equal models give exact zeros.
void MergeCase::reference_element(int64_t s, int64_t p, Reference& r) const {
  using Wide = long double;
  const int64_t models = spec.models;
  std::vector<Wide> theta_offset(models), alpha(models), weight(models);
  const double first = decode(spec.element, theta.data(), p);
  Wide total = 0, magnitude = 0, shift = 0;
  for (int64_t t = 0; t < models; ++t) {
    theta_offset[t] = Wide{decode(spec.element, theta.data(), t * stride() + p)} - first;
    alpha[t] = std::exp(Wide{decode(log_element(), log_weight.data(), s * models + t)});
    weight[t] = alpha[t] * (inputs.fisher ? decode(spec.element, fisher.data(), t * stride() + p) : 1.0);
    total += weight[t];
  }
  const bool zero = total == 0;
  if (zero) weight = alpha;
  if (zero) total = std::accumulate(alpha.begin(), alpha.end(), Wide{0});
  for (int64_t t = 0; t < models; ++t) {
    shift += weight[t] / total * theta_offset[t];
    magnitude += weight[t] / total * std::abs(first + theta_offset[t]);
  }
  r.merged[p] = static_cast<double>(first + shift);
  r.magnitude[p] = static_cast<double>(magnitude);
  const auto [lowest, highest] = std::minmax_element(theta_offset.begin(), theta_offset.end());
  const Wide width = *highest - *lowest;
  const Wide g = decode(spec.element, gradient.data(), spec.one_gradient ? 0 : p);
  for (int64_t t = 0; t < models; ++t) {
    const Wide share = weight[t] / total;
    const Wide slope = zero ? 0 : alpha[t] / total;
    r.rows[s * models + t] += static_cast<double>(g * share * (theta_offset[t] - shift));
    r.rows_magnitude[s * models + t] += static_cast<double>(std::abs(g) * share * width);
    r.theta[t * spec.elements + p] = static_cast<double>(g * share);
    r.fisher[t * spec.elements + p] = static_cast<double>(g * slope * (theta_offset[t] - shift));
    r.fisher_magnitude[t * spec.elements + p] = static_cast<double>(slope * width);
  }
}

}  // namespace timm_ext::test
