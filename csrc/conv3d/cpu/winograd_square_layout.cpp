// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "conv3d/cpu/winograd_square.h"

namespace timm_ext::cpu {
namespace {

constexpr int64_t kLeastChannels = kSquareLanes;
constexpr int64_t kLeastSize = 6;           // of an axis of three taps
constexpr int64_t kSlabElements = 1 << 18;  // of the forms of grad and input: they stay in a core's cache
constexpr int64_t kLeastTiles = 64;         // of a slab, so that the sums are seldom read and written
constexpr int64_t kPartSums = 1 << 20;      // elements of the sums of all parts
constexpr int64_t kMostParts = 16;
constexpr int64_t kLeastParts = 4;  // fewer leave threads idle

int64_t halved(int64_t count) { return (count + 1) / 2; }

}  // namespace

bool serves_winograd_square(const ConvShape& s) {
  if (std::min(s.outputs, s.inputs) < kLeastChannels) return false;
  for (int a = 0; a < 3; ++a) {
    const bool single = a == 0 && s.kernel[a] == 1 && s.padding[a] == 0;
    if (s.stride[a] != 1 || (s.dilation[a] != 1 && !single)) return false;
    if (!single && (s.kernel[a] != 3 || s.out[a] < kLeastSize)) return false;
  }
  return true;
}

WinogradSquareLayout::WinogradSquareLayout(const ConvShape& s, int64_t examples)
    : depth(s.kernel[0] == 3 ? 2 : 1),
      planes(depth == 2 ? halved(s.out[0]) : s.out[0]),
      rows(halved(s.out[1])),
      tiles(halved(s.out[2])),
      grad_blocks((s.outputs + kSquareLanes - 1) / kSquareLanes),
      input_blocks((s.inputs + kSquareLanes - 1) / kSquareLanes),
      together(examples * lines()),
      slab(0),
      parts(0) {
  const int64_t each = forms() * (grad_blocks + input_blocks) * line();
  slab = std::min(std::max(kSlabElements / each, (kLeastTiles + tiles - 1) / tiles), together);
  parts = std::min({kPartSums / part_sums(), together / slab, kMostParts});
  if (parts < kLeastParts) parts = 1;
}

}  // namespace timm_ext::cpu
