// SPDX-License-Identifier: Apache-2.0
//
// The CUDA square_accumulate kernel, run by the host executor, against acc + (scale·g)·g in the same arithmetic.
#include <cuda_runtime.h>

#include <random>
#include <vector>

#include "../cuda/square_accumulate.h"
#include "check.h"
#include "merge_case.h"

namespace {

using namespace timm_ext::test;
using timm_ext::cuda::kSquareAccumulateItems;
using timm_ext::cuda::SquareAccumulateItem;

template <class Compute>
void check_list(Element element, const std::vector<int64_t>& sizes, int64_t offset, double scale) {
  const Element sum_type = sizeof(Compute) == 8 ? Element::kFloat64 : Element::kFloat32;
  std::mt19937_64 random(sizes.size());
  std::vector<Buffer> sums, gradients;
  std::vector<std::vector<Compute>> truth;
  std::vector<SquareAccumulateItem> items;
  for (int64_t size : sizes) {
    sums.emplace_back(sum_type, size, offset);
    gradients.emplace_back(element, size, offset);
    truth.emplace_back();
    for (int64_t p = 0; p < size; ++p) {
      encode(element, gradients.back().data(), p, static_cast<double>(random() % 2001) / 1000 - 1);
      const Compute before = static_cast<Compute>(random() % 1000) / 7;
      const Compute g = static_cast<Compute>(decode(element, gradients.back().data(), p));
      encode(sum_type, sums.back().data(), p, before);
      truth.back().push_back(before + (g * static_cast<Compute>(scale)) * g);
    }
    items.push_back({sums.back().data(), gradients.back().data(), size});
  }
  const int64_t before = timm_ext::executor::launches();
  const int64_t count = static_cast<int64_t>(items.size());
  check(timm_ext::cuda::square_accumulate(items.data(), count, element, scale, nullptr) == 0, "launch failed");
  const int64_t limit = (count + kSquareAccumulateItems - 1) / kSquareAccumulateItems;
  check(timm_ext::executor::launches() - before <= limit, "too many launches");
  for (size_t i = 0; i < sizes.size(); ++i) {
    for (int64_t p = 0; p < sizes[i]; ++p) {
      const double value = decode(sum_type, sums[i].data(), p);
      check(value == static_cast<double>(truth[i][p]), "item %d, element %d: %.9g, truth %.9g", static_cast<int>(i),
            static_cast<int>(p), value, static_cast<double>(truth[i][p]));
    }
  }
}

void check_element(Element element, const std::vector<int64_t>& sizes, int64_t offset, double scale) {
  if (element == Element::kFloat64) return check_list<double>(element, sizes, offset, scale);
  check_list<float>(element, sizes, offset, scale);
}

}  // namespace

int main() {
  std::vector<int64_t> many(2 * kSquareAccumulateItems + 5);
  for (size_t i = 0; i < many.size(); ++i) many[i] = static_cast<int64_t>(i % 9);
  for (Element element : kElements) {
    for (int64_t offset : {0, 1}) {
      check_element(element, {1, 0, 2, 3, 4, 5, 127, 512, 2047, 2048, 2049, 5001}, offset, 0.25);
    }
    check_element(element, many, 0, 1.0);
    check_element(element, {0, 0}, 0, 1.0);
    check_element(element, {}, 0, 1.0);
  }
  return result();
}
