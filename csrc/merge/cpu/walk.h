// SPDX-License-Identifier: Apache-2.0
//
// How the kernels of the merge walk the flat buffer. A block is cut into chunks of kChunk elements that stay in the
// first-level cache, at fixed places of the buffer.
#pragma once

#include "math/tiles.h"
#include "merge/cpu/view.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {

/// Walks the blocks and calls, in order:
///   visitor.block_begins(begin)
///   visitor.view(view)                          elements of one segment, or of several
///   visitor.piece(view, segment)                for a segment that the view holds in part
///   visitor.whole_segments(view, first, last)   for the segments [first, last) that it holds whole
///   visitor.segment_ends(segment, cut)          after its last piece in this block; cut: others lie in other blocks
template <class S, class C, class Visitor>
class Walk {
 public:
  Walk(const MergeInputs& in, Visitor& visitor) : in_(in), visitor_(visitor), reader_(in) {}

  void blocks(int64_t first_block, int64_t last_block) {
    for (int64_t block = first_block; block < last_block; ++block) {
      begin_ = block * kBlock;
      end_ = begin_ + kBlock < in_.elements ? begin_ + kBlock : in_.elements;
      visitor_.block_begins(begin_);
      int64_t segment = math::find_segment(in_.offsets, in_.segments, begin_);
      for (int64_t begin = begin_; begin < end_; begin += kChunk) {
        segment = chunk(segment, begin, begin + kChunk < end_ ? begin + kChunk : end_);
      }
    }
  }

 private:
  /// Visits [begin, end), which starts in `segment`, and returns the segment of what follows.
  int64_t chunk(int64_t segment, int64_t begin, int64_t end) {
    int64_t last = segment;
    while (in_.offsets[last + 1] < end) ++last;
    if (last > segment && reader_.of_segments(segment, last, begin, end - begin, view_)) {
      segments(segment, last, begin, end);
    } else {
      for (int64_t s = segment; s <= last; ++s) {
        const int64_t from = in_.offsets[s] > begin ? in_.offsets[s] : begin;
        const int64_t to = in_.offsets[s + 1] < end ? in_.offsets[s + 1] : end;
        view_ = reader_.of_segment(s, from, to - from);
        visitor_.view(view_);
        visitor_.piece(view_, s);
        end_segment(s, end);
      }
    }
    return in_.offsets[last + 1] <= end ? last + 1 : last;
  }

  void segments(int64_t segment, int64_t last, int64_t begin, int64_t end) {
    const int64_t first_whole = in_.offsets[segment] < begin ? segment + 1 : segment;
    const int64_t last_whole = in_.offsets[last + 1] > end ? last : last + 1;
    visitor_.view(view_);
    if (first_whole > segment) {
      visitor_.piece(view_, segment);
      end_segment(segment, end);
    }
    visitor_.whole_segments(view_, first_whole, last_whole);
    if (last_whole == last) {
      visitor_.piece(view_, last);
      end_segment(last, end);
    }
  }

  /// Tells when nothing of the segment lies behind `end` in this block.
  void end_segment(int64_t segment, int64_t end) {
    if (in_.offsets[segment + 1] > end && end < end_) return;
    visitor_.segment_ends(segment, in_.offsets[segment] < begin_ || in_.offsets[segment + 1] > end_);
  }

  const MergeInputs& in_;
  Visitor& visitor_;
  ViewReader<S, C> reader_;
  View<C> view_;
  int64_t begin_ = 0;
  int64_t end_ = 0;
};

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
