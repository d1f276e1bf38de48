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

void check_item(size_t i, size_t k, const Tensor& acc, const Tensor& grad, const Tensor& first) {
  const std::string name = std::string(kOp) + ": acc[" + std::to_string(i) + "]";
  const std::string grad_name = std::string(kOp) + ": grads[" + std::to_string(k) + "]";
  check(element_of(grad.scalar_type()).has_value(), grad_name, " must be float32, bfloat16, float16 or float64 (got ",
        dtype_name(grad.scalar_type()), ")");
  check(grad.scalar_type() == first.scalar_type(), grad_name, " must have the dtype of grads[0] (got ",
        dtype_name(grad.scalar_type()), " vs ", dtype_name(first.scalar_type()), ")");
  check(grad.device() == first.device(), grad_name, " must be on the device of grads[0] (got ", device_name(grad),
        " vs ", device_name(first), ")");
  check(acc.device() == first.device(), name, " must be on the device of grads[0] (got ", device_name(acc), " vs ",
        device_name(first), ")");
  const ScalarType wanted = arithmetic_type(grad.scalar_type());
  check(acc.scalar_type() == wanted, name, " must be ", dtype_name(wanted), " for gradients of ",
        dtype_name(grad.scalar_type()), " (got ", dtype_name(acc.scalar_type()), ")");
  check(std::equal(acc.sizes().begin(), acc.sizes().end(), grad.sizes().begin(), grad.sizes().end()), name,
        " must have the shape of grads[", k, "] (got ", list(acc.sizes()), " vs ", list(grad.sizes()), ")");
  check(acc.is_contiguous(), name, " must be contiguous (got strides ", list(acc.strides()), ")");
  check(!overlap(acc, grad), name, " must not share memory with grads[", k, "]");
}

void check_apart(const std::vector<Tensor>& acc) {
  const auto begin = [&](size_t i) { return static_cast<const char*>(acc[i].const_data_ptr()); };
  std::vector<size_t> order;
  for (size_t i = 0; i < acc.size(); ++i) {
    if (acc[i].numel() > 0) order.push_back(i);
  }
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return begin(a) < begin(b); });
  for (size_t k = 1; k < order.size(); ++k) {
    check(!overlap(acc[order[k - 1]], acc[order[k]]), kOp, ": acc[", std::max(order[k - 1], order[k]),
          "] must not share memory with acc[", std::min(order[k - 1], order[k]), "]");
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
  check(each * count == grads.size() && (each > 0 || count == 0), kOp,
        ": grads must be as long a list as acc, or several times as long (got ", grads.size(), " for ", count, ")");
  if (acc.empty()) return;
  for (size_t k = 0; k < grads.size(); ++k) check_item(k % count, k, acc[k % count], grads[k], grads[0]);
  check_apart(acc);

  std::vector<Tensor> contiguous;  // keeps copies alive until the kernels are enqueued
  std::vector<const void*> gradients;
  std::vector<SquareAccumulateItem> items;
  for (size_t i = 0; i < count; ++i) {
    for (size_t k = i; k < grads.size(); k += count) {
      contiguous.push_back(grads[k].is_contiguous() ? grads[k] : torch::stable::contiguous(grads[k]));
      gradients.push_back(contiguous.back().const_data_ptr());
    }
  }
  for (size_t i = 0; i < count; ++i) {
    items.push_back({acc[i].mutable_data_ptr(), gradients.data() + i * each, acc[i].numel()});
  }
  const auto element = *element_of(grads[0].scalar_type());
  const auto gradients_of_each = static_cast<int64_t>(each);
  if (acc[0].is_cuda()) {
    launch_on_device_of(kOp, acc[0], [&](void* stream) {
      return cuda::square_accumulate(items.data(), static_cast<int64_t>(count), gradients_of_each, element, scale,
                                     stream);
    });
  } else {
    accumulate_cpu(items, gradients_of_each, element, scale);
  }
}

}  // namespace timm_ext
