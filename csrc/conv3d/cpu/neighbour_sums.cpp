// SPDX-License-Identifier: Apache-2.0
#include <cstring>

#include "conv3d/cpu/kernels.h"
#include "cpu/buffer.h"
#include "cpu/lanes.h"
#include "math/shuffle.h"

namespace timm_ext::cpu::TIMM_EXT_ISA {
namespace {

/// Two rows of each of two planes.
struct FourRows {
  const float* at[4];

  template <class C>
  C sum(int64_t column) const {
    C each[4];
    for (int k = 0; k < 4; ++k) each[k] = math::load<C>(at[k] + column);
    return (each[0] + each[1]) + (each[2] + each[3]);
  }
};

/// to[w] = sums of columns w - 1 and w; the last vector may overlap the one before.
template <class C>
void add_columns(const FourRows& rows, int64_t columns, float* to) {
  constexpr int64_t lanes = sizeof(C) / sizeof(float);
  to[0] = rows.sum<float>(0);
  for (int64_t w = 1; w < columns; w += lanes) {
    const int64_t at = smaller_of(w, columns - lanes);
    math::store(to + at, rows.sum<C>(at - 1) + rows.sum<C>(at));
  }
  to[columns] = rows.sum<float>(columns - 1);
}

void write_row(const FourRows& rows, int64_t columns, float* to) {
  if (columns > kLanes) {
    add_columns<V>(rows, columns, to);
  } else if (columns > 4) {
    add_columns<math::FloatQuad>(rows, columns, to);
  } else {
    add_columns<float>(rows, columns, to);
  }
}

}  // namespace

void neighbour_sums(const NeighbourSumsProblem& p, int64_t first_plane, int64_t last_plane) {
  const int64_t planes = p.size[0], rows = p.size[1], columns = p.size[2];
  const Buffer<float> zeros(columns);
  std::memset(zeros.get(), 0, columns * sizeof(float));
  float* to = p.to + first_plane * (rows + 1) * (columns + 1);
  for (int64_t plane = first_plane; plane < last_plane; ++plane) {
    const float* const volume = p.from + plane / (planes + 1) * planes * rows * columns;
    const int64_t d = plane % (planes + 1);
    const auto row_at = [&](int64_t of, int64_t row) -> const float* {
      return of >= 0 && of < planes && row >= 0 && row < rows ? volume + (of * rows + row) * columns : zeros.get();
    };
    for (int64_t h = 0; h <= rows; ++h, to += columns + 1) {
      write_row({{row_at(d - 1, h - 1), row_at(d - 1, h), row_at(d, h - 1), row_at(d, h)}}, columns, to);
    }
  }
}

}  // namespace timm_ext::cpu::TIMM_EXT_ISA
