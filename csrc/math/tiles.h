// SPDX-License-Identifier: Apache-2.0
//
// How the flat buffer is cut for the work: blocks of a fixed number of elements, and inside each block one piece for
// every segment that lies in it. The cut depends on the layout only, never on the number of threads.
#pragma once

#include <cstdint>

#include "math/portable.h"

namespace timm_ext::math {

/// The segment that holds element p: the last s with offsets[s] <= p; 0 <= p < offsets[segments].
TIMM_EXT_FN int64_t find_segment(const int64_t* offsets, int64_t segments, int64_t p) {
  int64_t low = 0;
  int64_t high = segments;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (offsets[middle] <= p) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

/// The part [begin, end) of a segment that lies in one block.
struct Piece {
  int64_t segment;
  int64_t begin;
  int64_t end;
  bool cut;  // the segment goes on in another block
};

/// Calls f(piece) for each piece of the block [begin, end), in order; end <= offsets[segments].
template <class F>
TIMM_EXT_FN void for_each_piece(const int64_t* offsets, int64_t segments, int64_t begin, int64_t end, const F& f) {
  if (begin >= end) return;
  for (int64_t s = find_segment(offsets, segments, begin); s < segments && offsets[s] < end; ++s) {
    const int64_t first = offsets[s] > begin ? offsets[s] : begin;
    const int64_t last = offsets[s + 1] < end ? offsets[s + 1] : end;
    f(Piece{s, first, last, first != offsets[s] || last != offsets[s + 1]});
  }
}

}  // namespace timm_ext::math
