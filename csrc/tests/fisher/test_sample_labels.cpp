// SPDX-License-Identifier: Apache-2.0
//
// The generator against its published numbers, and the CUDA sample_labels kernel, run by the host executor.
#include <cuda_runtime.h>

#include "fisher/cuda/launchers.h"
#include "math/sample.h"
#include "tests/check.h"
#include "tests/fisher/sample_case.h"

namespace {

using namespace timm_ext;
using test::check;

/// Known answers of the Random123 library for Philox 4x32-10; here the upper half of the counter is always 0.
void test_philox() {
  uint32_t x[4];
  math::philox(0u, 0u, 0, x);
  check(x[0] == 0x6627e8d5 && x[1] == 0xe169c58d && x[2] == 0xbc57ac4c && x[3] == 0x9b00dbd8, "philox of zeros");
}

}  // namespace

int main() {
  test_philox();
  const auto table = test::sample_table();
  for (size_t i = 0; i < table.size(); ++i) {
    test::SampleCase c(table[i], i);
    check(cuda::sample_labels(c.problem(), nullptr) == 0, "launch failed");
    c.check_results();
  }
  return test::result();
}
