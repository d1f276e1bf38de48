// SPDX-License-Identifier: Apache-2.0
#include "cpu/doubled.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstring>

namespace timm_ext::cpu {
namespace {

bool volume_comes_doubled(const float* volume, const int64_t (&size)[3]) {
  const int64_t row = size[2], plane = size[1] * row;
  for (int64_t d = 0; d < size[0]; d += 2, volume += 2 * plane) {
    for (int64_t h = 0; h < size[1]; h += 2) {
      if (std::memcmp(volume + h * row, volume + (h + 1) * row, row * sizeof(float)) != 0) return false;
    }
    if (std::memcmp(volume, volume + plane, plane * sizeof(float)) != 0) return false;
  }
  return true;
}

}  // namespace

bool comes_doubled(const float* volumes, int64_t count, const int64_t (&size)[3]) {
  const int64_t elements = size[0] * size[1] * size[2];
  std::atomic<bool> doubled{volume_comes_doubled(volumes, size)};
  if (!doubled) return false;
  torch::stable::parallel_for(1, count, 1, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last && doubled; ++n) {
      if (!volume_comes_doubled(volumes + n * elements, size)) doubled = false;
    }
  });
  return doubled;
}

}  // namespace timm_ext::cpu
