// SPDX-License-Identifier: Apache-2.0
#include "cuda/storage.h"
#include "fisher/cuda/launchers.h"
#include "math/square.h"

namespace timm_ext::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPacksPerThread = 4;

/// The tensors of one launch, passed as a kernel parameter. Accumulator i owns chunks [first_chunk[i], first_chunk[i +
/// 1]) and the gradients from i · each on.
struct Table {
  void* accumulator[kSquareAccumulateGradients];
  const void* gradient[kSquareAccumulateGradients];
  int64_t elements[kSquareAccumulateGradients];
  int64_t first_chunk[kSquareAccumulateGradients + 1];
  double scale;
  int count, each;
};
static_assert(sizeof(Table) <= 4096, "kernel parameters are limited to 4 KiB");

__device__ __forceinline__ int item_of(const Table& table, int64_t chunk) {
  int low = 0;
  int high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_chunk[middle] <= chunk) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

template <Element kElement>
struct Packs {
  using Bits = typename Storage<kElement>::Bits;
  using Compute = typename Storage<kElement>::Compute;
  static constexpr int kSize = 16 / sizeof(Compute);  // elements whose accumulators fill one vector
  static constexpr Element kAccumulator = sizeof(Compute) == 8 ? Element::kFloat64 : Element::kFloat32;
  using Accumulator = Pack<kAccumulator, 16>;
  using Gradient = Pack<kElement, kSize* static_cast<int>(sizeof(Bits))>;
  static constexpr int64_t kChunk = kThreads * kPacksPerThread * kSize;
};

template <Element kElement>
__global__ void __launch_bounds__(kThreads, 1) square_accumulate_kernel(const __grid_constant__ Table table) {
  using P = Packs<kElement>;
  using Compute = typename P::Compute;
  using AccumulatorBits = typename P::Accumulator::Bits;
  const Compute scale = static_cast<Compute>(table.scale);
  const int64_t chunks = table.first_chunk[table.count];
  for (int64_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const int item = item_of(table, chunk);
    AccumulatorBits* const accumulator = static_cast<AccumulatorBits*>(table.accumulator[item]);
    const void* const* const gradients = table.gradient + item * table.each;
    bool aligned = reinterpret_cast<uintptr_t>(accumulator) % sizeof(typename P::Accumulator) == 0;
    for (int j = 0; j < table.each; ++j) {
      aligned &= reinterpret_cast<uintptr_t>(gradients[j]) % sizeof(typename P::Gradient) == 0;
    }
    const int64_t start = (chunk - table.first_chunk[item]) * P::kChunk;
    TIMM_EXT_UNROLL
    for (int i = 0; i < kPacksPerThread; ++i) {
      const int64_t p = start + (static_cast<int64_t>(i) * kThreads + threadIdx.x) * P::kSize;
      const int64_t left = table.elements[item] - p;
      if (left <= 0) break;
      const bool whole = aligned && left >= P::kSize;
      const int count = left < P::kSize ? static_cast<int>(left) : P::kSize;
      auto sum =
          whole ? P::Accumulator::load_written(accumulator + p) : P::Accumulator::load_some(accumulator + p, count);
      for (int j = 0; j < table.each; ++j) {
        const auto* const gradient = static_cast<const typename P::Bits*>(gradients[j]) + p;
        const auto g = whole ? P::Gradient::load(gradient) : P::Gradient::load_some(gradient, count);
        TIMM_EXT_UNROLL
        for (int e = 0; e < P::kSize; ++e) sum.set(e, math::square_accumulate(sum.get(e), g.get(e), scale));
      }
      if (whole) {
        sum.store(accumulator + p);
      } else {
        sum.store_some(accumulator + p, count);
      }
    }
  }
}

template <Element kElement>
int launch_table(Table& table, void* stream) {
  table.first_chunk[0] = 0;
  for (int i = 0; i < table.count; ++i) {
    const int64_t chunks = (table.elements[i] + Packs<kElement>::kChunk - 1) / Packs<kElement>::kChunk;
    table.first_chunk[i + 1] = table.first_chunk[i] + chunks;
  }
  return launch(square_accumulate_kernel<kElement>, grid_size(table.first_chunk[table.count], 1), kThreads, stream,
                table);
}

int launch_element(Element element, Table& table, void* stream) {
  switch (element) {
    case Element::kBFloat16:
      return launch_table<Element::kBFloat16>(table, stream);
    case Element::kFloat16:
      return launch_table<Element::kFloat16>(table, stream);
    case Element::kFloat64:
      return launch_table<Element::kFloat64>(table, stream);
    default:
      return launch_table<Element::kFloat32>(table, stream);
  }
}

/// The gradients from `first` on of all items, `each` of one.
int launch_share(const SquareAccumulateItem* items, int64_t count, int64_t first, int each, Element element,
                 double scale, void* stream) {
  Table table = {};
  table.scale = scale;
  table.each = each;
  for (int64_t i = 0; i < count; ++i) {
    if (items[i].elements == 0) continue;
    table.accumulator[table.count] = items[i].accumulator;
    table.elements[table.count] = items[i].elements;
    for (int j = 0; j < each; ++j) table.gradient[table.count * each + j] = items[i].gradients[first + j];
    if (++table.count < kSquareAccumulateGradients / each) continue;
    if (const int error = launch_element(element, table, stream)) return error;
    table.count = 0;
  }
  return table.count ? launch_element(element, table, stream) : 0;
}

}  // namespace

int square_accumulate(const SquareAccumulateItem* items, int64_t count, int64_t each, Element element, double scale,
                      void* stream) {
  for (int64_t first = 0; first < each; first += kSquareAccumulateGradients) {
    const int64_t left = each - first;
    const int share = left < kSquareAccumulateGradients ? static_cast<int>(left) : kSquareAccumulateGradients;
    if (const int error = launch_share(items, count, first, share, element, scale, stream)) return error;
  }
  return 0;
}

}  // namespace timm_ext::cuda
