// SPDX-License-Identifier: Apache-2.0
//
// The cases of the host executor on a GPU: results within the same bounds, the same bits in a second run and when
// replayed from a CUDA graph. `test_on_gpu quick` leaves most cases out, for compute-sanitizer.
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "conv3d/cuda/conv_square.h"
#include "cuda/error.h"
#include "fisher/cuda/launchers.h"
#include "merge/cuda/launchers.h"
#include "tests/check.h"
#include "tests/conv3d/conv_case.h"
#include "tests/fisher/sample_case.h"
#include "tests/merge/merge_case.h"
#include "tests/merge/merge_check.h"

namespace {

using namespace timm_ext;
using namespace timm_ext::test;

void must(int error, const char* what) {
  if (error == 0) return;
  std::printf("%s: %s\n", what, cuda::error_string(error));
  std::exit(2);
}

/// Device memory of exactly the size of a host block; 16 more bytes in front when the block is to be misaligned.
class DeviceBuffer {
 public:
  DeviceBuffer(size_t bytes, size_t shift = 0) : bytes_(bytes), shift_(shift) {
    must(cudaMalloc(&memory_, shift + bytes + (bytes == 0)), "cudaMalloc");
  }
  DeviceBuffer(const void* host, size_t bytes, size_t shift = 0) : DeviceBuffer(bytes, shift) {
    must(cudaMemcpy(data(), host, bytes, cudaMemcpyHostToDevice), "copy to the device");
  }
  ~DeviceBuffer() { cudaFree(memory_); }
  DeviceBuffer(const DeviceBuffer&) = delete;

  void* data() const { return static_cast<char*>(memory_) + shift_; }
  std::vector<unsigned char> to_host() const {
    std::vector<unsigned char> host(bytes_);
    must(cudaMemcpy(host.data(), data(), bytes_, cudaMemcpyDeviceToHost), "copy from the device");
    return host;
  }

 private:
  void* memory_ = nullptr;
  size_t bytes_;
  size_t shift_;
};

/// A case on the device, and the results of the three launchers.
struct DeviceCase {
  const MergeCase& host;
  size_t shift;
  DeviceBuffer theta, fisher, log_weight, offsets, gradient;
  DeviceBuffer merged, rows, workspace, grad_theta, grad_fisher;
  MergeInputs inputs;

  explicit DeviceCase(const MergeCase& c)
      : host(c),
        shift(c.spec.offset * element_bytes(c.spec.element)),
        theta(c.theta.data(), c.theta.size(), shift),
        fisher(c.fisher.data(), c.fisher.size(), shift),
        log_weight(c.log_weight.data(), c.log_weight.size()),
        offsets(c.offsets.data(), c.offsets.size() * sizeof(int64_t)),
        gradient(c.gradient.data(), c.gradient.size(), c.spec.one_gradient ? 0 : shift),
        merged(c.spec.elements * element_bytes(c.spec.element), shift),
        rows(c.log_weight.size()),
        workspace(cuda::merge_backward_workspace_bytes(c.spec.models, c.spec.elements, c.spec.element)),
        grad_theta(c.spec.models * c.spec.elements * element_bytes(c.spec.element)),
        grad_fisher(c.spec.models * c.spec.elements * element_bytes(c.spec.element)),
        inputs(c.inputs) {
    inputs.theta = theta.data();
    inputs.fisher = c.inputs.fisher ? fisher.data() : nullptr;
    inputs.log_weight = log_weight.data();
    inputs.offsets = static_cast<const int64_t*>(offsets.data());
  }

  MergeMatrixGradients matrices() const {
    return {grad_theta.data(), inputs.fisher ? grad_fisher.data() : nullptr, host.spec.elements, host.spec.elements};
  }

  void launch(cudaStream_t stream) const {
    const MergeGradient upstream = {gradient.data(), host.upstream.stride};
    must(cuda::merge_forward(inputs, merged.data(), stream), "merge_forward");
    must(cuda::merge_backward_log_weight(inputs, upstream, rows.data(), workspace.data(), stream), "backward");
    must(cuda::merge_backward_matrices(inputs, upstream, matrices(), stream), "merge_backward_matrices");
  }

  std::vector<unsigned char> results() const {
    must(cudaDeviceSynchronize(), "kernels");
    std::vector<unsigned char> all;
    for (const DeviceBuffer* buffer : {&merged, &rows}) {
      const auto bytes = buffer->to_host();
      all.insert(all.end(), bytes.begin(), bytes.end());
    }
    return all;
  }
};

void check_case(const CaseSpec& spec, uint64_t seed, cudaStream_t stream) {
  const MergeCase c(spec, seed);
  const DeviceCase device(c);
  device.launch(stream);
  const auto first = device.results();
  const Reference truth = c.reference();
  check_merged(c, truth, device.merged.to_host().data());
  check_rows(c, truth, device.rows.to_host().data());
  auto theta = device.grad_theta.to_host();
  auto fisher = c.inputs.fisher ? device.grad_fisher.to_host() : std::vector<unsigned char>();
  check_matrices(c, truth, {theta.data(), c.inputs.fisher ? fisher.data() : nullptr, spec.elements, spec.elements});

  cudaGraph_t graph;
  cudaGraphExec_t replay;
  must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin capture");
  device.launch(stream);
  must(cudaStreamEndCapture(stream, &graph), "end capture");
  must(cudaGraphInstantiate(&replay, graph, 0), "instantiate graph");
  must(cudaGraphLaunch(replay, stream), "replay");
  check(device.results() == first, "%s: other bits in a second run", c.name.c_str());
  must(cudaGraphExecDestroy(replay), "destroy");
  must(cudaGraphDestroy(graph), "destroy");
}

void check_square_accumulate(cudaStream_t stream) {
  constexpr int kItems = 130, kEach = 2;
  std::vector<std::unique_ptr<DeviceBuffer>> sums, gradients;
  std::vector<std::vector<float>> host(kItems);
  std::vector<const void*> addresses;
  for (int i = 0; i < kItems; ++i) {
    const int64_t size = i == 7 ? 50001 : i % 11;
    for (int64_t p = 0; p < size; ++p) host[i].push_back(static_cast<float>((p * 7 + i) % 64) / 32 - 1);
    const std::vector<float> ones(size, 1.0f);
    sums.push_back(std::make_unique<DeviceBuffer>(ones.data(), size * sizeof(float)));
    gradients.push_back(std::make_unique<DeviceBuffer>(host[i].data(), size * sizeof(float)));
    addresses.insert(addresses.end(), kEach, gradients.back()->data());
  }
  std::vector<SquareAccumulateItem> items;
  for (int i = 0; i < kItems; ++i) {
    items.push_back({sums[i]->data(), addresses.data() + kEach * i, static_cast<int64_t>(host[i].size())});
  }
  must(cuda::square_accumulate(items.data(), kItems, kEach, Element::kFloat32, 0.25, stream), "square_accumulate");
  must(cudaDeviceSynchronize(), "square_accumulate");
  for (int i = 0; i < kItems; ++i) {
    const auto bytes = sums[i]->to_host();
    for (size_t p = 0; p < host[i].size(); ++p) {  // exact in float32
      const float truth = 1.0f + 0.5f * host[i][p] * host[i][p];
      check(decode(Element::kFloat32, bytes.data(), p) == truth, "square_accumulate, item %d, element %d", i, int(p));
    }
  }
}

/// Twice on the stream, the second time from a graph into another accumulator.
void check_conv_square(const ConvSpec& spec, uint64_t seed, cudaStream_t stream) {
  ConvCase c(spec, seed);
  const size_t shift = spec.offset * element_bytes(spec.element), bytes = c.accumulator.size() * sizeof(float);
  const DeviceBuffer grad(c.grad.data(), c.grad.size(), shift), input(c.input.data(), c.input.size(), shift);
  const DeviceBuffer sums(c.accumulator.data(), bytes), again(c.accumulator.data(), bytes);
  cuda::ConvSquareProblem problem = c.problem();
  problem.grad = grad.data();
  problem.input = input.data();
  problem.accumulator = static_cast<float*>(sums.data());
  const DeviceBuffer workspace(cuda::conv_square_workspace_bytes(problem));
  must(cuda::conv_square(problem, workspace.data(), stream), "conv_square");
  problem.accumulator = static_cast<float*>(again.data());
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin capture");
  must(cuda::conv_square(problem, workspace.data(), stream), "conv_square");
  must(cudaStreamEndCapture(stream, &graph), "end capture");
  must(cudaGraphInstantiate(&replay, graph, 0), "instantiate graph");
  must(cudaGraphLaunch(replay, stream), "replay");
  must(cudaDeviceSynchronize(), "conv_square");
  must(cudaGraphExecDestroy(replay), "destroy");
  must(cudaGraphDestroy(graph), "destroy");
  const auto found = sums.to_host();
  check(again.to_host() == found, "%s: other bits in a second run", spec.name().c_str());
  std::memcpy(c.accumulator.data(), found.data(), bytes);
  c.check_result();
}

void check_sample_labels(const SampleSpec& spec, uint64_t seed, cudaStream_t stream) {
  SampleCase c(spec, seed);
  const size_t label_bytes = c.labels.size() * sizeof(int64_t);
  const DeviceBuffer logits(c.logits.data(), c.logits.size()), keys(c.keys.data(), c.keys.size() * sizeof(int64_t));
  const DeviceBuffer labels(c.labels.data(), label_bytes), scores(c.scores.size());
  SampleProblem problem = c.problem();
  problem.logits = logits.data();
  problem.keys = static_cast<const int64_t*>(keys.data());
  problem.labels = spec.labels_wanted ? static_cast<int64_t*>(labels.data()) : nullptr;
  problem.scores = scores.data();
  must(cuda::sample_labels(problem, stream), "sample_labels");
  must(cudaDeviceSynchronize(), "sample_labels");
  c.scores = scores.to_host();
  const auto drawn = labels.to_host();
  std::memcpy(c.labels.data(), drawn.data(), label_bytes);
  c.check_results();
}

}  // namespace

int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::strcmp(argv[1], "quick") == 0;
  cudaStream_t stream;
  must(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
  const std::vector<CaseSpec> table = case_table();
  for (size_t i = 0; i < table.size(); i += quick ? 11 : 1) check_case(table[i], i + 1, stream);
  check_case({Element::kFloat32, 2, 512 * 280 + 5, Segments::kOne, FisherKind::kPlain}, 2001, stream);
  if (!quick) check_case({Element::kFloat32, 3, (1 << 21) + 77, Segments::kKernels, FisherKind::kWide}, 2002, stream);
  check_square_accumulate(stream);
  const std::vector<SampleSpec> samples = sample_table();
  for (size_t i = 0; i < samples.size(); i += quick ? 7 : 1) check_sample_labels(samples[i], i, stream);
  const std::vector<ConvSpec> convolutions = conv_table();
  for (size_t i = 0; i < convolutions.size(); i += quick ? 5 : 1) check_conv_square(convolutions[i], i, stream);
  must(cudaStreamDestroy(stream), "cudaStreamDestroy");
  return result();
}
