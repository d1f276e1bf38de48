// SPDX-License-Identifier: Apache-2.0
//
// The operators as registered in library.cpp, which states their contracts. Each serves CPU and CUDA tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace timm_ext {

using torch::stable::Tensor;

Tensor fused_merge(const Tensor& theta, const std::optional<Tensor>& fisher, const Tensor& log_weight,
                   const Tensor& offsets);
void fused_merge_out(const Tensor& theta, const std::optional<Tensor>& fisher, const Tensor& log_weight,
                     const Tensor& offsets, const Tensor& out);
Tensor fused_merge_backward_log_weight(const Tensor& grad, const Tensor& theta, const std::optional<Tensor>& fisher,
                                       const Tensor& log_weight, const Tensor& offsets);
std::tuple<Tensor, Tensor> fused_merge_backward_matrices(const Tensor& grad, const Tensor& theta,
                                                         const std::optional<Tensor>& fisher, const Tensor& log_weight,
                                                         const Tensor& offsets, bool theta_wanted, bool fisher_wanted);

Tensor log_weights(const Tensor& logits, const std::string& mixing);
Tensor log_weights_backward(const Tensor& grad, const Tensor& logits, const std::string& mixing);

Tensor conv3d_weight_gradient(const Tensor& grad, const Tensor& input, std::vector<int64_t> kernel,
                              std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                              int64_t groups);
void conv_weight_grad_square(const Tensor& acc, const Tensor& grad, const Tensor& input, std::vector<int64_t> stride,
                             std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, double scale);
Tensor depthwise_conv3d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                        std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation);
Tensor depthwise_conv_transpose3d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                                  std::vector<int64_t> stride, std::vector<int64_t> padding,
                                  std::vector<int64_t> dilation, std::vector<int64_t> size);
std::tuple<Tensor, Tensor> sample_labels(const Tensor& logits, const Tensor& keys, const std::string& likelihood,
                                         bool labels_wanted);
void square_accumulate(const std::vector<Tensor>& acc, const std::vector<Tensor>& grads, double scale);

std::tuple<Tensor, Tensor, Tensor> group_norm(const Tensor& input, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias, int64_t groups, double epsilon);
std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& input, const std::optional<Tensor>& weight,
                                              const std::optional<Tensor>& bias, double epsilon);
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(
    const Tensor& grad, const Tensor& input, const std::optional<Tensor>& mean, const std::optional<Tensor>& variance,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& slope,
    double epsilon, const std::string& over, bool slope_wanted);
std::tuple<Tensor, Tensor, Tensor> channels_last_norm(const Tensor& input, const std::optional<Tensor>& weight,
                                                      const std::optional<Tensor>& bias, int64_t groups,
                                                      double epsilon);
Tensor channels_last_sums(const Tensor& input);
std::tuple<Tensor, Tensor, Tensor> channels_last_norm_backward(const Tensor& grad, const Tensor& input,
                                                               const Tensor& mean, const Tensor& variance,
                                                               const std::optional<Tensor>& weight,
                                                               const std::optional<Tensor>& bias, double slope,
                                                               double epsilon);

Tensor upsample_nearest3d(const Tensor& input);
Tensor upsample_trilinear3d(const Tensor& input);
Tensor upsample_trilinear3d_backward(const Tensor& grad);
Tensor neighbour_sums3d(const Tensor& input);
Tensor small_conv3d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                    std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                    bool mirrored);
Tensor strided_conv3d_input_gradient(const Tensor& grad, const Tensor& weight, std::vector<int64_t> size);
Tensor upsampled_conv3d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias);
Tensor upsampled_conv3d_input_gradient(const Tensor& sums, const Tensor& weight);
void upsampled_conv3d_weight_grad_square(const Tensor& acc, const Tensor& sums, const Tensor& input, double scale);
Tensor winograd_conv3d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       std::vector<int64_t> padding, bool mirrored);

Tensor new_tensor(const Tensor& like, std::vector<int64_t> sizes);
void keep_memory(bool on);
void release_memory();
int64_t kept_bytes();

}  // namespace timm_ext
