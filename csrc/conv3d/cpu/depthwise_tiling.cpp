// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <map>
#include <utility>

#include "conv3d/cpu/conv_square.h"
#include "conv3d/cpu/depthwise.h"

namespace timm_ext::cpu {
namespace {

constexpr int64_t kPackedElements = int64_t{1} << 17;  // of a channel, which stay in the second-level cache
constexpr int64_t kLeastPlanes = 4;                    // of a chunk: neighbours pack the same planes again

int64_t quotient_up(int64_t a, int64_t b) { return a <= 0 ? -(-a / b) : (a + b - 1) / b; }

/// Of an axis of `size` elements, and `count` numbers j.
DepthwisePhase phase_at(int64_t start, int64_t step, int64_t size, int64_t count) {
  const int64_t first = std::clamp<int64_t>(quotient_up(-start, step), 0, count);
  return {start, first, std::clamp<int64_t>(quotient_up(size - start, step), first, count)};
}

}  // namespace

DepthwiseTiling::Axis DepthwiseTiling::plain_axis(const ConvShape& s, int a) {
  Axis axis;
  const int64_t step = s.stride[a];
  Target target{0, s.out[a], {}};
  std::map<int64_t, int64_t> phases;  // by remainder
  for (int64_t k = 0; k < s.kernel[a]; ++k) {
    const auto found = phases.emplace(k * s.dilation[a] % step, phases.size()).first;
    target.taps.push_back({k, found->second, k * s.dilation[a] / step});
  }
  axis.count = s.out[a];
  axis.reach = target.taps.back().offset;
  axis.phases.resize(phases.size());
  for (const auto& [remainder, phase] : phases) {
    axis.phases[phase] = phase_at(remainder - s.padding[a], step, s.in[a], axis.count + axis.reach);
  }
  axis.targets.push_back(std::move(target));
  return axis;
}

DepthwiseTiling::Axis DepthwiseTiling::transposed_axis(const ConvShape& s, int a) {
  Axis axis;
  const int64_t step = s.stride[a], earliest = s.padding[a] / step;  // j of the first point
  const int64_t span = (s.kernel[a] - 1) * s.dilation[a] / step;
  std::map<int64_t, std::vector<Tap>> taps;  // by remainder, for the earliest j
  for (int64_t k = s.kernel[a] - 1; k >= 0; --k) {
    taps[k * s.dilation[a] % step].push_back({k, 0, span - k * s.dilation[a] / step});
  }
  for (int64_t start = 0; start < std::min(step, s.in[a]); ++start) {
    const auto met = taps.find((start + s.padding[a]) % step);
    Target target{start, (s.in[a] - start + step - 1) / step, met == taps.end() ? std::vector<Tap>{} : met->second};
    for (Tap& tap : target.taps) {
      tap.offset += (start + s.padding[a]) / step - earliest;
      axis.reach = std::max(axis.reach, tap.offset);
    }
    axis.count = std::max(axis.count, target.count);
    axis.targets.push_back(std::move(target));
  }
  axis.phases.push_back(phase_at(earliest - span, 1, s.out[a], axis.count + axis.reach));
  return axis;
}

void DepthwiseTiling::set_sizes(const ConvShape& s, bool transposed, int64_t chunk) {
  int64_t phases = 1;
  for (int a = 0; a < 3; ++a) {
    layout_.in[a] = transposed ? s.out[a] : s.in[a];
    layout_.out[a] = transposed ? s.in[a] : s.out[a];
    layout_.step[a] = transposed ? 1 : s.stride[a];
    layout_.target_step[a] = transposed ? s.stride[a] : 1;
    layout_.phases[a] = axes_[a].phases.data();
    layout_.phase_count[a] = static_cast<int64_t>(axes_[a].phases.size());
    phases *= layout_.phase_count[a];
  }
  layout_.rows = round_up(axes_[1].count, kDepthwiseRows) + axes_[1].reach;
  layout_.columns = round_up(axes_[2].count, kDepthwiseColumns) + axes_[2].reach;
  const int64_t fitting = kPackedElements / (phases * layout_.rows * layout_.columns) - axes_[0].reach;
  layout_.chunk = chunk > 0 ? chunk : std::min(std::max(fitting, kLeastPlanes), axes_[0].count);
  layout_.chunks = (axes_[0].count + layout_.chunk - 1) / layout_.chunk;
  layout_.planes = layout_.chunk + axes_[0].reach;
}

void DepthwiseTiling::add_target(const ConvShape& s, const Target& plane, const Target& row, const Target& column) {
  DepthwiseTarget target{{plane.start, row.start, column.start},
                         {plane.count, row.count, column.count},
                         static_cast<int64_t>(runs_.size()),
                         0};
  for (const Tap& d : plane.taps) {
    for (const Tap& w : column.taps) {
      const Tap* previous = nullptr;
      for (const Tap& h : row.taps) {
        const bool next = previous != nullptr && h.phase == previous->phase && h.offset == previous->offset + 1;
        previous = &h;
        if (!next || runs_.back().taps == kDepthwiseTaps) {
          const int64_t phase = (d.phase * layout_.phase_count[1] + h.phase) * layout_.phase_count[2] + w.phase;
          const int64_t at = (d.offset * layout_.rows + h.offset) * layout_.columns + w.offset;
          runs_.push_back({phase * layout_.phase_elements() + at, static_cast<int64_t>(order_.size()), 0});
        }
        ++runs_.back().taps;
        order_.push_back((d.number * s.kernel[1] + h.number) * s.kernel[2] + w.number);
      }
    }
  }
  target.last_run = static_cast<int64_t>(runs_.size());
  // Those of as many taps side by side.
  std::stable_sort(runs_.begin() + target.first_run, runs_.end(),
                   [](const DepthwiseRun& a, const DepthwiseRun& b) { return a.taps > b.taps; });
  targets_.push_back(target);
}

DepthwiseTiling::DepthwiseTiling(const ConvShape& shape, bool transposed, int64_t chunk) {
  for (int a = 0; a < 3; ++a) axes_[a] = transposed ? transposed_axis(shape, a) : plain_axis(shape, a);
  for (Axis& axis : axes_) {
    for (Target& target : axis.targets) {  // rows of one phase side by side
      std::stable_sort(target.taps.begin(), target.taps.end(),
                       [](const Tap& x, const Tap& y) { return x.phase < y.phase; });
    }
  }
  set_sizes(shape, transposed, chunk);
  for (const Target& plane : axes_[0].targets) {
    for (const Target& row : axes_[1].targets) {
      for (const Target& column : axes_[2].targets) add_target(shape, plane, row, column);
    }
  }
  layout_.targets = targets_.data();
  layout_.target_count = static_cast<int64_t>(targets_.size());
  layout_.runs = runs_.data();
  layout_.order = order_.data();
  layout_.met = static_cast<int64_t>(order_.size());
  layout_.taps = shape.kernel[0] * shape.kernel[1] * shape.kernel[2];
}

}  // namespace timm_ext::cpu
