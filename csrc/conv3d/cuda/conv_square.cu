// SPDX-License-Identifier: Apache-2.0
#include "conv3d/cuda/conv_square_sums.h"
#include "cuda/launch.h"
#include "math/square.h"

namespace timm_ext::cuda {
namespace {

constexpr int kBlocksPerMultiprocessor = 3;  // 168 registers for a thread
constexpr int kFinishWarps = 8;

/// The tiles and examples of a launch.
struct Part {
  int first_tile, tiles;
  int64_t first_example;
  int examples;
  float* workspace;  // [tiles, examples, slices, tile]; null with one slice
};

template <Element kElement>
__device__ __forceinline__ ConvSource<kElement> source_of(const void* tensor, const int (&size)[3], int channels,
                                                          int groups, int group, int64_t example) {
  const int64_t each = static_cast<int64_t>(channels) * size[0] * size[1] * size[2];
  const auto* const values = static_cast<const typename Storage<kElement>::Bits*>(tensor);
  return {values + (example * groups + group) * each, size[0], size[1], size[2]};
}

template <Element kElement>
__device__ __forceinline__ void stage(const ConvSquareProblem& problem, const ConvTiling& p, const ConvPlace& place,
                                      const ConvOrigin& origin, int64_t example, float* grads, float* slab) {
  const auto grad = source_of<kElement>(problem.grad, p.size.out, p.size.outputs, p.groups, place.group, example);
  const auto input = source_of<kElement>(problem.input, p.size.in, p.size.inputs, p.groups, place.group, example);
  p.grad_vectors ? stage_grad<4>(p, place, origin, grad, grads) : stage_grad<1>(p, place, origin, grad, grads);
  p.input_vectors ? stage_input<4>(p, place, origin, input, slab) : stage_input<1>(p, place, origin, input, slab);
}

/// Brings a box into shared memory. The element type is looked at here alone: a kernel for each would take long to
/// build.
__device__ __forceinline__ void stage_box(const ConvSquareProblem& problem, const ConvTiling& p, const ConvPlace& place,
                                          const ConvOrigin& origin, int64_t example, float* grads, float* slab) {
  if (problem.element == Element::kBFloat16) {
    stage<Element::kBFloat16>(problem, p, place, origin, example, grads, slab);
  } else if (problem.element == Element::kFloat16) {
    stage<Element::kFloat16>(problem, p, place, origin, example, grads, slab);
  } else {
    stage<Element::kFloat32>(problem, p, place, origin, example, grads, slab);
  }
}

/// Where a tile's sum is squared into.
__device__ __forceinline__ float* accumulator_of(const ConvSquareProblem& problem, const ConvTiling& p,
                                                 const ConvPlace& place, int output, int column) {
  const int64_t columns = static_cast<int64_t>(p.unit_count) * p.rows * p.window;
  const int64_t row = static_cast<int64_t>(place.group) * p.size.outputs + place.output + output;
  return problem.accumulator + row * columns + static_cast<int64_t>(place.unit) * p.rows * p.window + column;
}

/// A block sums one slice of a tile for one example, or, where there is one slice, all of it for one after another.
template <int kWindow>
__global__ void __launch_bounds__(kConvThreads, kBlocksPerMultiprocessor)
    conv_square_kernel(const __grid_constant__ ConvSquareProblem problem, const __grid_constant__ ConvTiling p,
                       const __grid_constant__ Part part) {
  TIMM_EXT_DYNAMIC_SHARED(float4, shared);
  float* const slab = reinterpret_cast<float*>(shared);
  float* const grads = slab + p.units * p.unit_floats;

  const int tile = static_cast<int>(blockIdx.x) % part.tiles, run = static_cast<int>(blockIdx.x) / part.tiles;
  const int slice = run % p.slices, one = run / p.slices;
  const int first = static_cast<int>(static_cast<int64_t>(p.box_count) * slice / p.slices);
  const int last = static_cast<int>(static_cast<int64_t>(p.box_count) * (slice + 1) / p.slices);
  const ConvPlace place = conv_place(p, part.first_tile + tile);
  ConvSums<kWindow> sums(p, place);

  for (int example = one; example < (part.workspace ? one + 1 : part.examples); ++example) {
    sums.clear();
    for (int box = first; box < last; ++box) {
      const ConvOrigin origin(p, box);
      __syncthreads();
      stage_box(problem, p, place, origin, part.first_example + example, grads, slab);
      wait_for_copies();
      __syncthreads();
      const int planes = p.size.out[0] - origin.point[0], lines = p.size.out[1] - origin.point[1];
      sums.add_box(p, slab, grads, planes < p.box[0] ? planes : p.box[0], lines < p.box[1] ? lines : p.box[1]);
    }
    if (part.workspace) {
      const int64_t at = (static_cast<int64_t>(tile) * part.examples + example) * p.slices + slice;
      float* const to = part.workspace + at * p.tile_floats();
      sums.hand_out(p, place, slab,
                    [&](int output, int column, float sum) { to[output * p.columns() + column] = sum; });
    } else {
      sums.hand_out(p, place, slab, [&](int output, int column, float sum) {
        float* const to = accumulator_of(problem, p, place, output, column);
        *to = math::square_accumulate(*to, sum, problem.scale);
      });
    }
  }
}

/// Adds up the slices of 32 elements of a tile, each warp a share of them, and squares the sums, example by example.
__global__ void __launch_bounds__(kFinishWarps* kWarp, 1)
    conv_square_finish_kernel(const __grid_constant__ ConvSquareProblem problem, const __grid_constant__ ConvTiling p,
                              const __grid_constant__ Part part) {
  TIMM_EXT_SHARED(double, shares, kFinishWarps* kWarp);
  const int blocks = (p.tile_floats() + kWarp - 1) / kWarp;
  const int tile = static_cast<int>(blockIdx.x) / blocks;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int element = static_cast<int>(blockIdx.x) % blocks * kWarp + lane;
  const int output = element / p.columns(), column = element % p.columns();
  const ConvPlace place = conv_place(p, part.first_tile + tile);
  const bool there = output < place.outputs && column < place.units * p.rows * p.window;

  double squares = 0;
  for (int e = 0; e < part.examples; ++e) {
    const int64_t at = (static_cast<int64_t>(tile) * part.examples + e) * p.slices;
    const float* const from = part.workspace + at * p.tile_floats() + element;
    double share = 0;
    if (there) {
      TIMM_EXT_UNROLL_BY_EIGHT
      for (int slice = warp; slice < p.slices; slice += kFinishWarps) {
        share += static_cast<double>(__ldg(from + static_cast<int64_t>(slice) * p.tile_floats()));
      }
    }
    shares[threadIdx.x] = share;
    __syncthreads();
    if (warp == 0) {
      double sum = 0;
      TIMM_EXT_UNROLL
      for (int w = 0; w < kFinishWarps; ++w) sum += shares[w * kWarp + lane];
      squares += sum * problem.scale * sum;
    }
    __syncthreads();
  }
  if (warp == 0 && there) {
    float* const to = accumulator_of(problem, p, place, output, column);
    *to = static_cast<float>(*to + squares);
  }
}

int launch_sums(const ConvSquareProblem& problem, const ConvTiling& p, const Part& part, void* stream) {
  const int64_t runs = part.workspace ? static_cast<int64_t>(part.examples) * p.slices : 1;
  const Grid grid = {static_cast<unsigned>(part.tiles * runs), static_cast<unsigned>(p.threads),
                     static_cast<size_t>(p.shared_floats()) * sizeof(float)};
  if (p.window == 3) return launch(conv_square_kernel<3>, grid, stream, problem, p, part);
  return launch(conv_square_kernel<1>, grid, stream, problem, p, part);
}

int launch_part(const ConvSquareProblem& problem, const ConvTiling& p, const Part& part, void* stream) {
  const int error = launch_sums(problem, p, part, stream);
  if (error != 0 || !part.workspace) return error;
  const unsigned blocks = static_cast<unsigned>(part.tiles) * ((p.tile_floats() + kWarp - 1) / kWarp);
  return launch(conv_square_finish_kernel, blocks, kFinishWarps * kWarp, stream, problem, p, part);
}

}  // namespace

int conv_square(const ConvSquareProblem& problem, void* workspace, void* stream) {
  const ConvTiling p = conv_tiling(problem);
  const ConvPasses passes(p, problem);
  float* const memory = p.slices > 1 ? static_cast<float*>(workspace) : nullptr;
  for (int tile = 0; tile < p.tiles(); tile += passes.tiles) {
    const int tiles = p.tiles() - tile < passes.tiles ? p.tiles() - tile : passes.tiles;
    for (int64_t example = 0; example < problem.examples; example += passes.examples) {
      const int64_t left = problem.examples - example;
      const int examples = left < passes.examples ? static_cast<int>(left) : passes.examples;
      if (const int error = launch_part(problem, p, {tile, tiles, example, examples, memory}, stream)) return error;
    }
  }
  return 0;
}

}  // namespace timm_ext::cuda
