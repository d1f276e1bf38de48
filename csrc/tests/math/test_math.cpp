// SPDX-License-Identifier: Apache-2.0
//
// The one-element formulas and the storage conversions against the C library.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda/storage.h"
#include "math/exp.h"
#include "tests/check.h"

namespace {

using namespace timm_ext;
using cuda::Storage;
using test::check;

constexpr double kInf = std::numeric_limits<double>::infinity();

void test_exp() {
  for (double x = 0; x > -700; x -= 0.0371) {
    const double truth = std::exp(x), value = math::exp_nonpositive(x);
    check(std::abs(value - truth) <= 1e-15 * truth, "exp(%g) is %.17g, truth %.17g", x, value, truth);
  }
  check(math::exp_nonpositive(0.0) == 1 && math::exp_nonpositive(-kInf) == 0, "exp at its ends");
  check(std::isnan(math::exp_nonpositive(std::nan(""))), "exp of NaN");
}

void test_float_exp() {
  for (float x = 0; x > -87; x -= 0.00371f) {
    const double truth = std::exp(static_cast<double>(x));
    check(std::abs(math::exp_nonpositive_float(x) - truth) <= 1.5e-7 * truth, "exp(%g)", static_cast<double>(x));
  }
  check(math::exp_nonpositive_float(0.0f) == 1 && math::exp_nonpositive_float(-87.5f) == 0, "exp at its ends");
  check(math::exp_nonpositive_float(-static_cast<float>(kInf)) == 0, "exp of -inf");
  check(std::isnan(math::exp_nonpositive_float(std::nanf(""))), "exp of NaN");
}

void test_sigmoid() {
  for (double x = -60; x < 60; x += 0.0173) {
    const double truth = x < 0 ? x - std::log1p(std::exp(x)) : -std::log1p(std::exp(-x));
    check(std::abs(math::log_sigmoid(x) - truth) <= 2e-15 * std::abs(truth), "log sigmoid of %g", x);
    check(std::abs(math::sigmoid(x) - std::exp(truth)) <= 4e-15 * std::exp(truth), "sigmoid of %g", x);
  }
}

void test_log() {
  for (double x = 1e-310; x < 1e300; x *= 1.7) {
    const double truth = std::log(x);
    check(std::abs(math::log_positive(x) - truth) <= 2e-15 * std::abs(truth), "log(%g)", x);
  }
  check(math::log_positive(0.0) == -kInf && math::log_positive(1.0) == 0 && math::log_positive(kInf) == kInf,
        "log ends");
  check(std::isnan(math::log_positive(-1.0)) && std::isnan(math::log_positive(std::nan(""))), "log of no number");
}

/// The shorter series, for results that are rounded to float.
void test_short_series() {
  for (double x = -69; x < 69; x += 0.0173) {
    const double tail = std::exp(-std::abs(x)), log = std::min(x, 0.0) - std::log1p(tail);
    const double exp_value = math::exp_nonpositive<math::kExpTerms<float>>(-std::abs(x));
    const double log_value = math::log_sigmoid<math::kExpTerms<float>, math::kLogTerms<float>>(x);
    check(std::abs(exp_value - tail) <= 1e-9 * tail, "short exp(%g)", -std::abs(x));
    check(std::abs(log_value - log) <= 2e-9 * std::abs(log), "short log sigmoid of %g", x);
    const double power = std::exp(x);
    check(std::abs(math::log_positive<math::kLogTerms<float>>(power) - x) <= 2e-9 * std::abs(x) + 1e-15, "short log");
  }
}

void test_weights() {
  const double row[] = {-3, 0.5, -kInf};
  check(math::row_maximum(row, 3) == 0.5, "row maximum");
  const double none[] = {-kInf, -kInf}, wrong[] = {0, std::nan("")}, infinite[] = {kInf, 0};
  for (const double* bad : {none, wrong, infinite}) check(std::isnan(math::row_maximum(bad, 2)), "no maximum");
  check(math::relative_weight<float>(0.5, 0.5) == 1 && math::relative_weight<float>(-kInf, 0.5) == 0, "weight ends");
  check(math::relative_weight<float>(-80, 0) == 0 && math::relative_weight<float>(-69, 0) > 0, "weight below 2^-100");
  check(std::isnan(math::relative_weight<float>(0, std::nan(""))), "weight of no number");
}

template <class V>
void test_scale(double smallest, double largest, double least) {
  for (double x = smallest; x < largest; x *= 1.37) {
    const V value = static_cast<V>(x);
    const V scale = math::reciprocal_power_of_two(value);
    int exponent;
    check(std::frexp(scale, &exponent) == V{0.5} && std::isnormal(scale), "scale of %g is no normal power of 2", x);
    const V scaled = value * scale;
    check(scaled >= static_cast<V>(least) && scaled < 4, "%g scaled to %g", x, static_cast<double>(scaled));
    check(!std::isnormal(value) || x > 4e37 || (scaled >= V{0.5} && scaled < 1), "%g scaled beside 0.5 … 1", x);
  }
}

/// Every 16-bit pattern survives, and rounding goes to the nearest, ties to even.
template <Element kElement>
void test_storage(double limit) {
  using S = Storage<kElement>;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = S::decode(static_cast<uint16_t>(bits));
    if (value != value) {
      check(S::decode(S::encode(value)) != S::decode(S::encode(value)), "NaN pattern %x", bits);
      continue;
    }
    check(S::encode(value) == bits, "pattern %x comes back as %x", bits, S::encode(value));
    if (bits >= 0x8000 || value >= limit) continue;
    const double next = S::decode(static_cast<uint16_t>(bits + 1));
    const float middle = static_cast<float>((value + next) / 2);
    check(S::encode(middle) == bits + (bits & 1), "tie above pattern %x", bits);
    check(S::encode(std::nextafter(middle, 0.0f)) == bits, "just below the tie above pattern %x", bits);
    check(S::encode(std::nextafter(middle, INFINITY)) == bits + 1, "just above the tie above pattern %x", bits);
  }
}

}  // namespace

int main() {
  test_exp();
  test_float_exp();
  test_sigmoid();
  test_log();
  test_short_series();
  test_weights();
  test_scale<float>(1e-45, 3e38, 0x1p-23);
  test_scale<double>(1e-300, 1e300, 0.5);
  test_storage<Element::kFloat16>(65504);
  test_storage<Element::kBFloat16>(3.38e38);
  return test::result();
}
