// SPDX-License-Identifier: Apache-2.0
#include "tests/conv3d/conv_case.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "tests/check.h"

namespace timm_ext::test {
namespace {

constexpr double kScale = 0.25;
constexpr double kTolerance = 5e-6;  // of the largest element

ConvShape shape_of(const ConvSpec& spec) {
  ConvShape s = {spec.outputs, spec.inputs, {}, {}, {}, {}, {}, {}};
  for (int a = 0; a < 3; ++a) {
    s.in[a] = spec.in[a];
    s.kernel[a] = spec.kernel[a];
    s.stride[a] = spec.stride[a];
    s.padding[a] = spec.padding[a];
    s.dilation[a] = spec.dilation[a];
    s.out[a] = (s.in[a] + 2 * s.padding[a] - s.dilation[a] * (s.kernel[a] - 1) - 1) / s.stride[a] + 1;
  }
  s.out[2] -= spec.cut;
  return s;
}

int64_t product(const int64_t (&sizes)[3]) { return sizes[0] * sizes[1] * sizes[2]; }

/// One channel of one example, 0 outside.
struct Channel {
  const std::vector<double>& values;
  int64_t first;
  const int64_t (&size)[3];

  double at(int64_t d, int64_t h, int64_t w) const {
    const bool inside = d >= 0 && d < size[0] && h >= 0 && h < size[1] && w >= 0 && w < size[2];
    return inside ? values[first + (d * size[1] + h) * size[2] + w] : 0;
  }
};

/// Σ over the points of grad · input at a tap.
double correlation(const ConvShape& s, const Channel& grad, const Channel& input, int64_t kd, int64_t kh, int64_t kw) {
  double sum = 0;
  for (int64_t d = 0; d < s.out[0]; ++d) {
    for (int64_t h = 0; h < s.out[1]; ++h) {
      for (int64_t w = 0; w < s.out[2]; ++w) {
        sum += grad.at(d, h, w) * input.at(d * s.stride[0] + kd * s.dilation[0] - s.padding[0],
                                           h * s.stride[1] + kh * s.dilation[1] - s.padding[1],
                                           w * s.stride[2] + kw * s.dilation[2] - s.padding[2]);
      }
    }
  }
  return sum;
}

std::vector<double> fill(Buffer& buffer, Element element, int64_t count, bool one_sign, std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  std::vector<double> values(count);
  for (int64_t i = 0; i < count; ++i) {
    const double value = normal(random);
    encode(element, buffer.data(), i, one_sign ? std::abs(value) : value);
    values[i] = decode(element, buffer.data(), i);
  }
  return values;
}

}  // namespace

std::string ConvSpec::name() const {
  std::string text = "element " + std::to_string(static_cast<int>(element)) + ", B " + std::to_string(examples) + ", " +
                     std::to_string(groups) + " x " + std::to_string(outputs) + " x " + std::to_string(inputs);
  for (const auto* axes : {&in, &kernel, &stride, &padding, &dilation}) {
    text += ", (";
    for (int64_t value : *axes) text += " " + std::to_string(value);
    text += " )";
  }
  return text;
}

std::vector<ConvSpec> conv_table() {
  constexpr Element f32 = Element::kFloat32;
  std::vector<ConvSpec> table = {
      // Three taps along the last axis: aligned, odd sizes, one point, no padding, more of it, misaligned memory.
      {f32, 2, 1, 8, 4, {4, 6, 8}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}},
      {f32, 1, 1, 5, 3, {5, 7, 9}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}},
      {f32, 3, 1, 16, 16, {1, 1, 1}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}},
      {f32, 2, 1, 20, 6, {3, 5, 6}, {3, 3, 3}},
      {f32, 1, 1, 3, 2, {4, 4, 12}, {3, 3, 3}, {1, 1, 1}, {2, 0, 5}},
      {f32, 1, 1, 4, 4, {4, 4, 16}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, 0, 1},
      {f32, 1, 1, 4, 4, {2, 3, 36}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, 3},
      // Several tiles of outputs and units; groups; kernels whose other axes differ.
      {f32, 2, 1, 70, 23, {2, 2, 2}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}},
      {f32, 1, 1, 9, 40, {3, 3, 4}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}},
      {f32, 2, 3, 4, 2, {4, 4, 4}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}},
      {f32, 1, 7, 1, 1, {5, 5, 5}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}},
      {f32, 1, 1, 6, 3, {9, 8, 8}, {2, 5, 3}, {2, 1, 1}, {0, 2, 1}, {1, 2, 1}},
      {f32, 1, 1, 33, 5, {6, 12, 8}, {7, 7, 3}, {1, 1, 1}, {3, 3, 1}},
      {f32, 1, 1, 4, 3, {40, 6, 8}, {3, 3, 3}, {1, 1, 1}, {0, 1, 1}, {19, 1, 1}},
      {f32, 1, 1, 4, 3, {6, 40, 8}, {3, 3, 3}, {1, 1, 1}, {1, 0, 1}, {1, 18, 1}},
      // Any other last axis: strides, dilation, even and long kernels, pointwise.
      {f32, 2, 1, 12, 5, {8, 8, 8}, {3, 3, 3}, {2, 2, 2}, {1, 1, 1}},
      {f32, 2, 1, 64, 5, {2, 2, 2}, {3, 3, 3}, {2, 2, 2}, {1, 1, 1}},
      {f32, 1, 1, 7, 9, {7, 5, 11}, {3, 3, 3}, {2, 1, 3}, {1, 0, 2}},
      {f32, 1, 1, 8, 4, {6, 6, 16}, {3, 3, 3}, {1, 1, 1}, {2, 2, 2}, {2, 2, 2}},
      {f32, 1, 1, 2, 3, {4, 4, 64}, {1, 1, 3}, {1, 1, 1}, {0, 0, 0}, {1, 1, 20}},
      {f32, 1, 1, 9, 6, {4, 5, 6}, {2, 2, 2}},
      {f32, 1, 1, 3, 2, {5, 5, 9}, {5, 5, 5}, {1, 1, 1}, {2, 2, 2}},
      {f32, 1, 1, 2, 1, {11, 11, 11}, {11, 11, 11}},
      {f32, 2, 1, 10, 20, {3, 4, 8}, {1, 1, 1}},
      {f32, 1, 2, 3, 4, {6, 6, 6}, {1, 1, 1}, {2, 2, 2}},
      {f32, 1, 1, 66, 30, {2, 2, 3}, {2, 3, 2}, {1, 1, 1}, {1, 1, 1}},
      // One and two axes.
      {f32, 2, 1, 6, 5, {1, 12, 13}, {1, 3, 3}, {1, 1, 1}, {0, 1, 1}},
      {f32, 1, 1, 4, 70, {1, 1, 50}, {1, 1, 3}, {1, 1, 1}, {0, 0, 1}},
      {f32, 3, 1, 2, 3, {1, 1, 200}, {1, 1, 5}, {1, 1, 2}, {0, 0, 2}, {1, 1, 3}},
      {f32, 1, 1, 2, 2, {1, 9, 10}, {1, 4, 2}, {1, 2, 2}, {0, 1, 1}},
      // Several slices, their examples or tiles in several passes; long sums of one sign.
      {f32, 3, 1, 2, 2, {9, 16, 32}, {3, 3, 3}, {1, 1, 1}, {1, 1, 1}},
      {f32, 2, 2, 3, 2, {7, 20, 21}, {3, 3, 3}, {2, 1, 2}, {1, 1, 1}},
      {f32, 3, 3, 2, 1, {8, 8, 16}, {1, 1, 3}, {1, 1, 1}, {0, 0, 1}, {1, 1, 1}, 0, 0, false, 800},
      {f32, 3, 3, 2, 1, {8, 8, 16}, {1, 1, 3}, {1, 1, 1}, {0, 0, 1}, {1, 1, 1}, 0, 0, false, 3000},
      {f32, 1, 1, 2, 1, {16, 32, 32}, {1, 1, 3}, {1, 1, 1}, {0, 0, 1}, {1, 1, 1}, 0, 0, true, 4 * 24 * 4},
      {f32, 1, 1, 1, 1, {8, 16, 32}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}, 0, 0, true, 1},
  };
  const std::vector<ConvSpec> wide = {table[0], table[1], table[5], table[15], table[29]};
  for (Element element : {Element::kBFloat16, Element::kFloat16}) {
    for (ConvSpec spec : wide) {
      spec.element = element;
      table.push_back(spec);
    }
  }
  return table;
}

ConvCase::ConvCase(const ConvSpec& spec, uint64_t seed)
    : spec(spec),
      shape(shape_of(spec)),
      grad(spec.element, spec.examples * spec.groups * spec.outputs * product(shape.out), spec.offset),
      input(spec.element, spec.examples * spec.groups * spec.inputs * product(shape.in), spec.offset) {
  std::mt19937_64 random(seed);
  const int64_t points = product(shape.out), places = product(shape.in), outputs = spec.groups * spec.outputs;
  const auto g = fill(grad, spec.element, spec.examples * outputs * points, spec.one_sign, random);
  const auto x = fill(input, spec.element, spec.examples * spec.groups * spec.inputs * places, spec.one_sign, random);
  for (int64_t o = 0; o < outputs; ++o) {
    for (int64_t i = 0; i < spec.inputs; ++i) {
      for (int64_t tap = 0; tap < product(shape.kernel); ++tap) {
        const int64_t kw = tap % shape.kernel[2], kh = tap / shape.kernel[2] % shape.kernel[1];
        const int64_t kd = tap / shape.kernel[2] / shape.kernel[1];
        accumulator.push_back(static_cast<float>(random() % 1000) / 1000);
        double squares = 0;
        for (int64_t b = 0; b < spec.examples; ++b) {
          const int64_t channel = (b * spec.groups + o / spec.outputs) * spec.inputs + i;
          const double sum = correlation(shape, {g, (b * outputs + o) * points, shape.out},
                                         {x, channel * places, shape.in}, kd, kh, kw);
          squares += sum * sum;
        }
        truth_.push_back(accumulator.back() + kScale * squares);
      }
    }
  }
}

cuda::ConvSquareProblem ConvCase::problem() {
  return {grad.data(),         input.data(),  accumulator.data(), shape,
          spec.groups,         spec.examples, spec.element,       static_cast<float>(kScale),
          spec.workspace_limit};
}

void ConvCase::check_result() const {
  const double largest = *std::max_element(truth_.begin(), truth_.end());
  for (size_t i = 0; i < truth_.size(); ++i) {
    check(std::abs(accumulator[i] - truth_[i]) <= kTolerance * largest, "%s: element %d is %.9g, truth %.9g",
          spec.name().c_str(), static_cast<int>(i), static_cast<double>(accumulator[i]), truth_[i]);
  }
}

}  // namespace timm_ext::test
