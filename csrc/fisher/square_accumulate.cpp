// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "cuda_launch.h"
#include "fisher/cpu/kernels.h"
#include "fisher/cuda/launchers.h"
#include "operators.h"

namespace timm_ext {
namespace {

constexpr const char* kOp = "square_accumulate_";

/// What all gradients share, the first one's.
struct Kind {
  ScalarType type;
  ScalarType sums;
  torch::stable::Device device;
};

void check_gradient(size_t k, const Tensor& grad, const Tensor& first, const Kind& kind) {
  TIMM_EXT_CHECK(grad.scalar_type() == kind.type, kOp, ": grads[", k, "] must have the dtype of grads[0] (got ",
                 dtype_name(grad.scalar_type()), " vs ", dtype_name(kind.type), ")");
  TIMM_EXT_CHECK(grad.device() == kind.device, kOp, ": grads[", k, "] must be on the device of grads[0] (got ",
                 device_name(grad), " vs ", device_name(first), ")");
}

void check_accumulator(size_t i, const Tensor& acc, const Tensor& first, const Kind& kind) {
  TIMM_EXT_CHECK(acc.device() == kind.device, kOp, ": acc[", i, "] must be on the device of grads[0] (got ",
                 device_name(acc), " vs ", device_name(first), ")");
  TIMM_EXT_CHECK(acc.scalar_type() == kind.sums, kOp, ": acc[", i, "] must be ", dtype_name(kind.sums),
                 " for gradients of ", dtype_name(kind.type), " (got ", dtype_name(acc.scalar_type()), ")");
  TIMM_EXT_CHECK(acc.is_contiguous(), kOp, ": acc[", i, "] must be contiguous (got strides ", list(acc.strides()), ")");
}

void check_apart(const std::vector<Span>& acc) {
  std::vector<size_t> order;
  for (size_t i = 0; i < acc.size(); ++i) {
    if (acc[i].begin < acc[i].end) order.push_back(i);
  }
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return acc[a].begin < acc[b].begin; });
  for (size_t k = 1; k < order.size(); ++k) {
    TIMM_EXT_CHECK(!acc[order[k - 1]].overlaps(acc[order[k]]), kOp, ": acc[", std::max(order[k - 1], order[k]),
                   "] must not share memory with acc[", std::min(order[k - 1], order[k]), "]");
  }
}

/// The gradients of each accumulator one after another, as the kernels read them.
struct Gradients {
  std::vector<const void*> data;
  std::vector<Tensor> copies;  // of those that are not contiguous, alive until the kernels are enqueued
};

/// Checks the gradients of accumulator i against it, and appends them.
void take_gradients(size_t i, const Tensor& acc, const Span& acc_span, const std::vector<Tensor>& grads, size_t step,
                    Gradients& to) {
  const auto sizes = acc.sizes();
  for (size_t k = i; k < grads.size(); k += step) {
    const auto given = grads[k].sizes();
    TIMM_EXT_CHECK(std::equal(sizes.begin(), sizes.end(), given.begin(), given.end()), kOp, ": acc[", i,
                   "] must have the shape of grads[", k, "] (got ", list(sizes), " vs ", list(given), ")");
    const Span span = span_of(grads[k]);
    TIMM_EXT_CHECK(!acc_span.overlaps(span), kOp, ": acc[", i, "] must not share memory with grads[", k, "]");
    if (grads[k].is_contiguous()) {
      to.data.push_back(span.begin);
    } else {
      to.copies.push_back(torch::stable::contiguous(grads[k]));
      to.data.push_back(to.copies.back().const_data_ptr());
    }
  }
}

/// Hands the lists to threads in blocks of a fixed size, whatever the sizes of the tensors.
void accumulate_cpu(const std::vector<SquareAccumulateItem>& items, int64_t each, Element element, double scale) {
  std::vector<int64_t> first_block{0};
  for (const auto& item : items) first_block.push_back(first_block.back() + cpu::block_count(item.elements));
  const auto kernel = cpu::square_accumulate;
  torch::stable::parallel_for(0, first_block.back(), 1, [&](int64_t first, int64_t last) {
    size_t i = std::upper_bound(first_block.begin(), first_block.end(), first) - first_block.begin() - 1;
    for (; i < items.size() && first_block[i] < last; ++i) {
      const int64_t begin = (std::max(first, first_block[i]) - first_block[i]) * cpu::kBlock;
      const int64_t end = (std::min(last, first_block[i + 1]) - first_block[i]) * cpu::kBlock;
      kernel(items[i], each, element, scale, begin, std::min(end, items[i].elements));
    }
  });
}

}  // namespace

void square_accumulate(const std::vector<Tensor>& acc, const std::vector<Tensor>& grads, double scale) {
  const size_t count = acc.size(), each = count == 0 ? 0 : grads.size() / count;
  TIMM_EXT_CHECK(each * count == grads.size() && (each > 0 || count == 0), kOp,
                 ": grads must be as long a list as acc, or several times as long (got ", grads.size(), " for ", count,
                 ")");
  if (acc.empty()) return;
  const ScalarType type = grads[0].scalar_type();
  const auto element = element_of(type);
  TIMM_EXT_CHECK(element.has_value(), kOp, ": grads[0] must be float32, bfloat16, float16 or float64 (got ",
                 dtype_name(type), ")");
  const Kind kind{type, arithmetic_type(type), grads[0].device()};
  for (size_t k = 0; k < grads.size(); ++k) check_gradient(k, grads[k], grads[0], kind);

  Gradients gradients;
  gradients.data.reserve(grads.size());
  std::vector<Span> spans;
  std::vector<SquareAccumulateItem> items;
  for (size_t i = 0; i < count; ++i) {
    check_accumulator(i, acc[i], grads[0], kind);
    spans.push_back(span_of(acc[i]));
    take_gradients(i, acc[i], spans[i], grads, count, gradients);
  }
  check_apart(spans);
  for (size_t i = 0; i < count; ++i) {
    items.push_back({acc[i].mutable_data_ptr(), gradients.data.data() + i * each, acc[i].numel()});
  }
  if (!acc[0].is_cuda()) return accumulate_cpu(items, static_cast<int64_t>(each), *element, scale);
  launch_on_device_of(kOp, acc[0], [&](void* stream) {
    return cuda::square_accumulate(items.data(), static_cast<int64_t>(count), static_cast<int64_t>(each), *element,
                                   scale, stream);
  });
}

}  // namespace timm_ext
