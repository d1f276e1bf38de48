// SPDX-License-Identifier: Apache-2.0
#include "conv3d/cuda/conv_square_tiling.h"

#include <algorithm>

namespace timm_ext::cuda {
namespace {

constexpr int kBoxPoints = 128;
constexpr int kLinePoints = 32;
// Blocks of one example that are wanted, and the least points of a slice in return: four rounds on the largest GPUs
// where writing a tile costs a tenth of computing it; one round at any price.
constexpr int kManyBlocks = 1536, kManyPoints = 256;
constexpr int kSomeBlocks = 400, kSomePoints = 64;
constexpr int kVector = 4;
constexpr int kWarpThreads = 32;
constexpr int kBanks = 32;

template <class V>
V divided_up(V count, V by) {
  return (count + by - 1) / by;
}

/// The length of the equal parts of `count` that are no longer than `most`.
int even(int count, int most) { return divided_up(count, divided_up(count, most)); }

/// The next number that leaves `rest` when divided by the number of banks of shared memory.
int padded(int64_t floats, int rest) { return static_cast<int>(floats + ((rest - floats) % kBanks + kBanks) % kBanks); }

void choose_outputs(ConvTiling& p) {
  constexpr int most = 64;
  p.output_tiles = divided_up(p.size.outputs, most);
  p.output_threads = divided_up(divided_up(p.size.outputs, p.output_tiles), kConvOutputs);
}

void choose_box(ConvTiling& p) {
  const int* const out = p.size.out;
  const int lines = static_cast<int>(std::min<int64_t>(int64_t{out[0]} * out[1], kBoxPoints / kLinePoints));
  p.box[2] = divided_up(even(out[2], kBoxPoints / lines), kConvStep) * kConvStep;
  p.box[1] = even(out[1], std::max(1, kBoxPoints / p.box[2]));
  p.box[0] = even(out[0], std::max(1, kBoxPoints / (p.box[2] * p.box[1])));
}

/// Lays out the slab. Planes of neighbouring units and taps begin in banks four apart: threads next to each other read
/// vectors from them.
void lay_out(ConvTiling& p) {
  const ConvSize& s = p.size;
  for (int a = 0; a < 3; ++a) {
    const bool dense = p.taps[a] > 1;  // else only the places that are read are kept
    p.point_step[a] = dense ? s.stride[a] : 1;
    p.tap_step[a] = dense ? s.dilation[a] : 0;
    p.input_step[a] = dense ? 1 : s.stride[a];
    p.extent[a] = (p.box[a] - 1) * p.point_step[a] + (p.taps[a] - 1) * p.tap_step[a] + 1;
  }
  const int rest = s.padding[2] % kVector;
  p.lead = p.window == 3 ? kVector - 1 : p.input_step[2] == 1 ? (kVector - rest) % kVector : 0;
  p.extent[2] += p.lead + p.window - 1;
  p.line_floats = divided_up(p.extent[2], kVector) * kVector;
  if (p.window == 3) p.line_floats = p.box[2] + 2 * kVector;
  p.plane_floats = padded(int64_t{p.extent[1]} * p.line_floats, kVector);
  p.unit_floats = padded(int64_t{p.extent[0]} * p.plane_floats, kVector * p.taps[0]);
  p.grad_floats = padded(int64_t{p.box[0]} * p.box[1] * p.box[2], kVector);
}

bool fits(const ConvTiling& p) {
  return int64_t{p.units} * p.unit_floats + int64_t{p.outputs()} * p.grad_floats <= kConvSharedFloats;
}

void halve(int& count) { count = (count + 1) / 2; }

/// Makes box and tile smaller until they fit into shared memory; false where they cannot be made small enough.
bool shrink(ConvTiling& p) {
  constexpr int enough = 4;  // units that pay for what else is loaded
  for (lay_out(p); !fits(p); lay_out(p)) {
    if (p.box[0] > 1) {
      halve(p.box[0]);
    } else if (p.box[1] > 2 || (p.box[1] > 1 && p.units <= enough)) {
      halve(p.box[1]);
    } else if (p.units > 1) {
      halve(p.units);
    } else {
      return false;
    }
  }
  return true;
}

/// Whether the slab takes no more than its points at every tap would.
bool dense_enough(const ConvTiling& p) {
  for (int a = 0; a < 3; ++a) {
    const int64_t reach = int64_t{p.box[a] - 1} * p.size.stride[a] + int64_t{p.taps[a] - 1} * p.size.dilation[a] + 1;
    if (p.taps[a] > 1 && reach > int64_t{p.box[a]} * p.taps[a]) return false;
  }
  return true;
}

/// Divides the taps into those that are units of their own and those of a unit.
void divide_taps(ConvTiling& p) {
  p.rows = 1;
  p.unit_count = p.size.inputs;
  for (int a = 0; a < 3; ++a) {
    const int taps = a == 2 ? p.size.kernel[2] / p.window : p.size.kernel[a];
    (a < p.outside ? p.unit_count : p.rows) *= taps;
    p.taps[a] = a < p.outside ? 1 : taps;
  }
}

/// Tries units of a whole channel first, then of single taps of one axis after another.
void choose_units(ConvTiling& p) {
  const ConvTiling before = p;
  const int most = kConvThreads / p.output_threads * conv_rows(p.window);
  const int last = p.window == 3 ? 2 : 3;
  for (int outside = 0; outside <= last; ++outside) {
    p = before;
    p.outside = outside;
    divide_taps(p);
    if (outside < last && (p.rows > most || !dense_enough(p))) continue;
    p.units = even(p.unit_count, most / p.rows);
    if (shrink(p)) break;
  }
  p.units = even(p.unit_count, p.units);
  p.unit_tiles = divided_up(p.unit_count, p.units);
  p.lanes = divided_up(p.units * p.rows, conv_rows(p.window));
  p.threads = divided_up(p.lanes * p.output_threads, kWarpThreads) * kWarpThreads;
}

ConvWalk walk(int threads, int b, int c, int d) {
  ConvWalk w = {{b, c, d}, {}};
  for (int axis = 3; axis > 0; --axis) {
    w.step[axis] = threads % w.limit[axis - 1];
    threads /= w.limit[axis - 1];
  }
  w.step[0] = threads;
  return w;
}

bool aligned(const void* address, Element element) {
  return reinterpret_cast<uintptr_t>(address) % (element == Element::kFloat32 ? 16 : 8) == 0;
}

void choose_walks(ConvTiling& p, const ConvSquareProblem& problem) {
  const ConvSize& s = p.size;
  const bool one_start = p.outside < 3 || s.kernel[2] == 1;
  p.input_vectors = one_start && p.input_step[2] == 1 && s.in[2] % kVector == 0 &&
                    (p.lead + s.padding[2]) % kVector == 0 && aligned(problem.input, problem.element);
  p.grad_vectors = s.out[2] % kVector == 0 && aligned(problem.grad, problem.element);
  const int values = p.input_vectors ? p.line_floats / kVector : p.extent[2];
  p.input_walk = walk(p.threads, p.extent[0], p.extent[1], values);
  p.grad_walk = walk(p.threads, p.box[0], p.box[1], p.grad_vectors ? p.box[2] / kVector : p.box[2]);
}

void choose_slices(ConvTiling& p, int64_t workspace_limit) {
  p.box_count = 1;
  for (int a = 0; a < 3; ++a) p.box_count *= p.boxes[a] = divided_up(p.size.out[a], p.box[a]);
  const int64_t points = int64_t{p.size.out[0]} * p.size.out[1] * p.size.out[2];
  const int64_t many = std::min<int64_t>(divided_up(kManyBlocks, p.tiles()), points / kManyPoints);
  const int64_t some = std::min<int64_t>(divided_up(kSomeBlocks, p.tiles()), points / kSomePoints);
  const int64_t room = workspace_limit / static_cast<int64_t>(sizeof(float)) / p.tile_floats();
  const int64_t slices = std::max({many, some, divided_up(points, kConvRun)});
  p.slices = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>({slices, p.box_count, room})));
}

template <class From, class To>
void copy_axes(const From (&from)[3], To (&to)[3]) {
  for (int a = 0; a < 3; ++a) to[a] = static_cast<To>(from[a]);
}

ConvSize size_of(const ConvShape& s) {
  ConvSize size = {static_cast<int>(s.outputs), static_cast<int>(s.inputs), {}, {}, {}, {}, {}, {}};
  copy_axes(s.out, size.out);
  copy_axes(s.in, size.in);
  copy_axes(s.kernel, size.kernel);
  copy_axes(s.stride, size.stride);
  copy_axes(s.padding, size.padding);
  copy_axes(s.dilation, size.dilation);
  return size;
}

}  // namespace

bool conv_square_serves(const ConvSquareProblem& problem) {
  constexpr int64_t limit = int64_t{1} << 31;
  const ConvShape& s = problem.shape;
  int64_t columns = s.inputs;
  for (int a = 0; a < 3; ++a) {
    const int64_t reach = (s.out[a] + kBoxPoints) * s.stride[a] + s.kernel[a] * s.dilation[a];
    if (std::max({reach, s.in[a] + 2 * s.padding[a], columns *= s.kernel[a]}) >= limit) return false;
  }
  return std::max(problem.groups * s.outputs * columns, problem.groups * s.inputs * s.in[0] * s.in[1]) < limit &&
         std::max(problem.groups * s.outputs, s.out[2]) * s.out[0] * s.out[1] < limit;
}

ConvTiling conv_tiling(const ConvSquareProblem& problem) {
  ConvTiling p = {};
  p.size = size_of(problem.shape);
  p.groups = static_cast<int>(problem.groups);
  p.window = p.size.kernel[2] == 3 && p.size.stride[2] == 1 && p.size.dilation[2] == 1 ? 3 : 1;
  choose_outputs(p);
  choose_box(p);
  choose_units(p);
  choose_walks(p, problem);
  choose_slices(p, problem.workspace_limit);
  return p;
}

ConvPasses::ConvPasses(const ConvTiling& p, const ConvSquareProblem& problem) {
  const int64_t each = static_cast<int64_t>(sizeof(float)) * p.slices * p.tile_floats();
  const int64_t room = p.slices == 1 ? p.tiles() * problem.examples : problem.workspace_limit / each;
  examples = static_cast<int>(std::min(problem.examples, room));
  tiles = static_cast<int>(std::min<int64_t>(p.tiles(), room / examples));
}

size_t conv_square_workspace_bytes(const ConvSquareProblem& problem) {
  const ConvTiling p = conv_tiling(problem);
  const ConvPasses passes(p, problem);
  return p.slices == 1 ? 0 : sizeof(float) * p.slices * p.tile_floats() * passes.tiles * passes.examples;
}

}  // namespace timm_ext::cuda
