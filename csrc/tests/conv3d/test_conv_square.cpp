// SPDX-License-Identifier: Apache-2.0
//
// The CUDA conv_square kernels, run by the host executor, and how a tiling divides the work.
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "conv3d/cuda/conv_square_tiling.h"
#include "tests/check.h"
#include "tests/conv3d/conv_case.h"

namespace {

using namespace timm_ext::test;
namespace cuda = timm_ext::cuda;

/// Runs a case with a workspace of just the bytes asked for, filled with NaN.
void run(ConvCase& c) {
  const cuda::ConvSquareProblem problem = c.problem();
  check(cuda::conv_square_serves(problem), "%s: not served", c.spec.name().c_str());
  const size_t bytes = cuda::conv_square_workspace_bytes(problem);
  check(static_cast<int64_t>(bytes) <= problem.workspace_limit, "%s: %zu bytes of workspace", c.spec.name().c_str(),
        bytes);
  Buffer workspace(Element::kFloat32, static_cast<int64_t>(bytes / sizeof(float)));
  check(cuda::conv_square(problem, workspace.data(), nullptr) == 0, "launch failed");
}

void test_squares() {
  const auto table = conv_table();
  bool one_slice = false, more = false, whole = false, single_taps = false, few_examples = false, few_tiles = false;
  for (size_t i = 0; i < table.size(); ++i) {
    ConvCase first(table[i], i), second(table[i], i);
    timm_ext::executor::set_seed(2 * i);
    run(first);
    first.check_result();
    const cuda::ConvTiling tiling = cuda::conv_tiling(first.problem());
    (tiling.slices > 1 ? more : one_slice) = true;
    (tiling.outside > 0 ? single_taps : whole) = true;
    const cuda::ConvPasses passes(tiling, first.problem());
    few_examples |= passes.examples < table[i].examples;
    few_tiles |= passes.tiles < tiling.tiles() && passes.examples == table[i].examples;
    if (i % 4 != 0) continue;
    timm_ext::executor::set_seed(2 * i + 1);
    run(second);
    check(first.accumulator == second.accumulator, "%s: other bits in a second run", table[i].name().c_str());
  }
  check(one_slice && more && whole && single_taps && few_examples && few_tiles,
        "the table leaves out a way through the kernel");
}

cuda::ConvTiling tiling_of(int64_t outputs, int64_t inputs, int64_t edge, int64_t kernel = 3, int64_t stride = 1) {
  const int64_t out = (edge + 2 * (kernel / 2) - kernel) / stride + 1, pad = kernel / 2;
  cuda::ConvSquareProblem problem = {};
  problem.shape = {outputs,
                   inputs,
                   {out, out, out},
                   {edge, edge, edge},
                   {kernel, kernel, kernel},
                   {stride, stride, stride},
                   {pad, pad, pad},
                   {1, 1, 1}};
  problem.groups = problem.examples = 1;
  return cuda::conv_tiling(problem);
}

/// The layers of the published network at 128³ and at 32³ fill a GPU and fit into memory.
void test_plans() {
  for (int64_t edge : {128, 32}) {
    for (int64_t level = 0; level < 5; ++level) {
      const int64_t width = 16 << level, size = edge >> level;
      for (const auto& p : {tiling_of(width, width, size), tiling_of(2 * width, width, size, 3, 2),
                            tiling_of(width, 2 * width, size), tiling_of(width, 4, size)}) {
        const std::string name = std::to_string(width) + " channels at " + std::to_string(size);
        check(p.shared_floats() <= cuda::kConvSharedFloats, "%s: shared memory", name.c_str());
        check(p.threads <= cuda::kConvThreads && p.threads % 32 == 0, "%s: %d threads", name.c_str(), p.threads);
        const int64_t room = int64_t{p.lanes} * p.output_threads * cuda::kConvOutputs * cuda::conv_rows(p.window);
        check(int64_t{p.outputs()} * p.units * p.rows <= room, "%s: rows without a thread", name.c_str());
        check(p.input_vectors == (p.size.in[2] % 4 == 0), "%s: vectors", name.c_str());
        const int64_t points = int64_t{p.size.out[0]} * p.size.out[1] * p.size.out[2];
        check(points / p.slices <= 2 * cuda::kConvRun, "%s: %d slices", name.c_str(), p.slices);
        check(int64_t{p.tiles()} * p.slices >= std::min<int64_t>(400, points / 128), "%s: %d blocks", name.c_str(),
              p.tiles() * p.slices);
      }
    }
  }
}

void test_limits() {
  cuda::ConvSquareProblem problem = {};
  problem.shape = {1, 1, {1, 1, 100}, {1, 1, 102}, {1, 1, 3}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}};
  problem.groups = problem.examples = 1;
  check(cuda::conv_square_serves(problem), "a small problem is refused");
  problem.shape.in[2] = int64_t{1} << 31;
  check(!cuda::conv_square_serves(problem), "an axis beyond 32 bits is taken");
  problem.shape.in[2] = 102;
  problem.shape.inputs = int64_t{1} << 30;
  problem.groups = 2;
  check(!cuda::conv_square_serves(problem), "lines beyond 32 bits are taken");
}

}  // namespace

int main() {
  test_plans();
  test_limits();
  test_squares();
  return result();
}
