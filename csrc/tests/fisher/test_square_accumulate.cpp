// SPDX-License-Identifier: Apache-2.0
//
// The CUDA square_accumulate kernel, run by the host executor, against acc + (scale·g)·g in the same arithmetic.
#include <cuda_runtime.h>

#include <random>
#include <vector>

#include "fisher/cuda/launchers.h"
#include "tests/check.h"
#include "tests/elements.h"

namespace {

using namespace timm_ext::test;
using timm_ext::SquareAccumulateItem;
using timm_ext::cuda::kSquareAccumulateGradients;

struct List {
  Element element;
  std::vector<int64_t> sizes;
  int64_t each = 1;  // gradients of an accumulator
  int64_t offset = 0;
  double scale = 1;
};

template <class Compute>
void check_list(const List& list) {
  const Element sum_type = sizeof(Compute) == 8 ? Element::kFloat64 : Element::kFloat32;
  std::mt19937_64 random(list.sizes.size());
  std::vector<Buffer> sums, gradients;
  std::vector<const void*> addresses;
  std::vector<std::vector<Compute>> truth;
  for (int64_t size : list.sizes) {
    sums.emplace_back(sum_type, size, list.offset);
    truth.emplace_back();
    for (int64_t p = 0; p < size; ++p) {
      truth.back().push_back(static_cast<Compute>(random() % 1000) / 7);
      encode(sum_type, sums.back().data(), p, truth.back().back());
    }
    for (int64_t j = 0; j < list.each; ++j) {
      gradients.emplace_back(list.element, size, list.offset);
      addresses.push_back(gradients.back().data());
      for (int64_t p = 0; p < size; ++p) {
        encode(list.element, gradients.back().data(), p, static_cast<double>(random() % 2001) / 1000 - 1);
        const Compute g = static_cast<Compute>(decode(list.element, gradients.back().data(), p));
        truth.back()[p] += (g * static_cast<Compute>(list.scale)) * g;
      }
    }
  }
  const int64_t count = static_cast<int64_t>(list.sizes.size());
  std::vector<SquareAccumulateItem> items;
  for (int64_t i = 0; i < count; ++i) {
    items.push_back({sums[i].data(), addresses.data() + i * list.each, list.sizes[i]});
  }
  const int64_t before = timm_ext::executor::launches();
  check(timm_ext::cuda::square_accumulate(items.data(), count, list.each, list.element, list.scale, nullptr) == 0,
        "launch failed");
  const int64_t limit = (count * list.each + kSquareAccumulateGradients - 1) / kSquareAccumulateGradients;
  check(timm_ext::executor::launches() - before <= limit, "too many launches");
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t p = 0; p < list.sizes[i]; ++p) {
      const double value = decode(sum_type, sums[i].data(), p);
      check(value == static_cast<double>(truth[i][p]), "item %d, element %d: %.9g, truth %.9g", static_cast<int>(i),
            static_cast<int>(p), value, static_cast<double>(truth[i][p]));
    }
  }
}

void check_list(const List& list) {
  list.element == Element::kFloat64 ? check_list<double>(list) : check_list<float>(list);
}

}  // namespace

int main() {
  std::vector<int64_t> many(2 * kSquareAccumulateGradients + 5);
  for (size_t i = 0; i < many.size(); ++i) many[i] = static_cast<int64_t>(i % 9);
  for (Element element : kElements) {
    for (int64_t offset : {0, 1}) {
      check_list({element, {1, 0, 2, 3, 4, 5, 127, 512, 2047, 2048, 2049, 5001}, 1, offset, 0.25});
      check_list({element, {5, 0, 2049, 17}, 3, offset, 0.25});
    }
    check_list({element, many});
    check_list({element, {7, 33}, kSquareAccumulateGradients + 1});
    check_list({element, {0, 0}});
    check_list({element, {}});
  }
  return result();
}
