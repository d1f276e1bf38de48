// SPDX-License-Identifier: Apache-2.0
//
// On each axis, with what lies outside taken from the edge:
//     y[2 i] = x[i - 1] / 4 + 3 x[i] / 4        y[2 i + 1] = 3 x[i] / 4 + x[i + 1] / 4
//     gradient of x[i] = (g[2 i - 1] + g[2 i + 2]) / 4 + 3 (g[2 i] + g[2 i + 1]) / 4
// Planes are mixed first, then rows, then columns.
#include "conv3d/cpu/trilinear.h"

#include "cpu/buffer.h"
#include "cpu/lanes.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

constexpr float kFar = 0.25f, kNear = 0.75f;

void mix_two(const float* far, const float* near, int64_t count, float* __restrict__ to) {
  for (int64_t i = 0; i < count; ++i) to[i] = kFar * far[i] + kNear * near[i];
}

void mix_four(const float* const (&rows)[4], int64_t count, float* __restrict__ to) {
  const float *const a = rows[0], *const b = rows[1], *const c = rows[2], *const d = rows[3];
  for (int64_t i = 0; i < count; ++i) to[i] = kFar * (a[i] + d[i]) + kNear * (b[i] + c[i]);
}

/// The neighbour of an enlarged place, besides the half of it: the one before an even place, the one behind an odd one.
int64_t far_of(int64_t place, int64_t size) {
  return place % 2 == 0 ? larger_of(place / 2 - 1, 0) : smaller_of(place / 2 + 1, size - 1);
}

/// Four enlarged neighbours of a place, each `step` elements long.
struct Four {
  Four(const float* from, int64_t place, int64_t size, int64_t step)
      : rows{from + larger_of(2 * place - 1, 0) * step, from + 2 * place * step, from + (2 * place + 1) * step,
             from + smaller_of(2 * place + 2, 2 * size - 1) * step} {}
  const float* rows[4];
};

/// `row` has room for an element on both sides.
void spread(float* row, int64_t columns, float* __restrict__ to) {
  row[-1] = row[0];
  row[columns] = row[columns - 1];
  for (int64_t w = 0; w < columns; ++w) {
    const float near = kNear * row[w];
    to[2 * w] = kFar * row[w - 1] + near;
    to[2 * w + 1] = kFar * row[w + 1] + near;
  }
}

void gather(float* row, int64_t columns, float* __restrict__ to) {
  row[-1] = row[0];
  row[2 * columns] = row[2 * columns - 1];
  for (int64_t w = 0; w < columns; ++w) {
    to[w] = kFar * (row[2 * w - 1] + row[2 * w + 2]) + kNear * (row[2 * w] + row[2 * w + 1]);
  }
}

}  // namespace

void upsample_trilinear_planes(const TrilinearProblem& p, int64_t first_plane, int64_t last_plane) {
  const int64_t depth = p.size[0], rows = p.size[1], columns = p.size[2], plane = rows * columns;
  Buffer<float> mixed(plane), row(columns + 2 * 16);
  for (int64_t z = first_plane; z < last_plane; ++z) {
    const float* const volume = p.from + z / (2 * depth) * depth * plane;
    const int64_t place = z % (2 * depth);
    mix_two(volume + far_of(place, depth) * plane, volume + place / 2 * plane, plane, mixed.get());
    for (int64_t y = 0; y < 2 * rows; ++y) {
      mix_two(mixed.get() + far_of(y, rows) * columns, mixed.get() + y / 2 * columns, columns, row.get() + 16);
      spread(row.get() + 16, columns, p.to + (z * 2 * rows + y) * 2 * columns);
    }
  }
}

void upsample_trilinear_gradient_planes(const TrilinearProblem& p, int64_t first_plane, int64_t last_plane) {
  const int64_t depth = p.size[0], rows = p.size[1], columns = p.size[2], plane = 4 * rows * columns;
  Buffer<float> mixed(plane), row(2 * columns + 2 * 16);
  for (int64_t z = first_plane; z < last_plane; ++z) {
    const Four planes(p.from + z / depth * 2 * depth * plane, z % depth, depth, plane);
    mix_four(planes.rows, plane, mixed.get());
    for (int64_t y = 0; y < rows; ++y) {
      const Four four(mixed.get(), y, rows, 2 * columns);
      mix_four(four.rows, 2 * columns, row.get() + 16);
      gather(row.get() + 16, columns, p.to + (z * rows + y) * columns);
    }
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
