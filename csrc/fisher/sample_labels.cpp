// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "cuda_launch.h"
#include "fisher/cpu/kernels.h"
#include "fisher/cuda/launchers.h"
#include "operators.h"

namespace timm_ext {
namespace {

using torch::stable::parallel_for;

constexpr const char* kOp = "sample_labels";

bool parse(const std::string& likelihood) {
  TIMM_EXT_CHECK(likelihood == "bernoulli" || likelihood == "categorical", kOp,
                 ": likelihood must be 'bernoulli' or 'categorical' (got '", likelihood, "')");
  return likelihood == "categorical";
}

void check_arguments(const Tensor& logits, const Tensor& keys) {
  TIMM_EXT_CHECK(logits.dim() >= 2 && logits.size(1) >= 1, kOp, ": logits must be [B, K, ...] with K >= 1 (got ",
                 list(logits.sizes()), ")");
  const ScalarType type = logits.scalar_type();
  TIMM_EXT_CHECK(type == ScalarType::Float || type == ScalarType::Double, kOp,
                 ": logits must be float32 or float64 (got ", dtype_name(type), ")");
  check_dtype(kOp, "keys", keys, ScalarType::Long, "");
  TIMM_EXT_CHECK(keys.dim() == 1 && keys.size(0) == logits.size(0), kOp, ": keys must be [B] = [", logits.size(0),
                 "] (got ", list(keys.sizes()), ")");
  check_same_device(kOp, "keys", keys, "logits", logits);
}

std::vector<int64_t> label_sizes(const Tensor& logits, bool categorical, bool wanted) {
  if (!wanted) return {0};
  std::vector<int64_t> sizes(logits.sizes().begin(), logits.sizes().end());
  if (categorical) sizes.erase(sizes.begin() + 1);
  return sizes;
}

}  // namespace

std::tuple<Tensor, Tensor> sample_labels(const Tensor& logits, const Tensor& keys, const std::string& likelihood,
                                         bool labels_wanted) {
  const bool categorical = parse(likelihood);
  check_arguments(logits, keys);
  const Tensor z = torch::stable::contiguous(logits), k = torch::stable::contiguous(keys);
  const Tensor labels = torch::stable::new_empty(k, label_sizes(logits, categorical, labels_wanted));
  const Tensor scores = new_tensor(logits, std::vector<int64_t>(logits.sizes().begin(), logits.sizes().end()));
  if (logits.numel() == 0) return {labels, scores};

  const int64_t examples = logits.size(0), classes = categorical ? logits.size(1) : 1;
  const SampleProblem problem{z.const_data_ptr(),
                              static_cast<const int64_t*>(k.const_data_ptr()),
                              labels_wanted ? static_cast<int64_t*>(labels.mutable_data_ptr()) : nullptr,
                              scores.mutable_data_ptr(),
                              *element_of(logits.scalar_type()),
                              categorical,
                              examples,
                              classes,
                              logits.numel() / examples / classes};
  if (logits.is_cuda()) {
    launch_on_device_of(kOp, logits, [&](void* stream) { return cuda::sample_labels(problem, stream); });
  } else {
    parallel_for(0, examples * cpu::block_count(problem.voxels), 1,
                 [&](int64_t first, int64_t last) { cpu::sample_labels(problem, first, last); });
  }
  return {labels, scores};
}

}  // namespace timm_ext
