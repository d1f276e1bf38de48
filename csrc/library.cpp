// SPDX-License-Identifier: Apache-2.0
//
// Every operator of the namespace `timm_ext` on one page. T models, P elements, S segments.
//
// Common to all, unless said otherwise: the result depends on the arguments only, bit for bit, not on the number of
// threads or the CPU's instruction set; inputs are never changed unless marked (a!); sizes and offsets are 64-bit; a
// call with nothing to do returns at once. Functions, fake kernels and derivatives are in timm_ext/ops,
// a twin of each in plain PyTorch in timm_ext/ops/reference.py.
#include <torch/csrc/stable/library.h>

#include "guarded.h"
#include "operators.h"

STABLE_TORCH_LIBRARY(timm_ext, m) {
  // The Fisher-weighted mean of T models, with w_t = exp(log_weight[s, t]) F[t, p] in segment s:
  //     merged[p] = Σ_t w_t theta[t, p] / Σ_t w_t
  // theta, fisher [T, P] float32, bfloat16, float16 or float64, both alike; rows may lie further apart than P; fisher
  // >= 0, None stands for 1. log_weight [S, T] contiguous, float32 (float64 for float64 matrices); -inf leaves a model
  // out; adding a constant to a row changes nothing. offsets [S + 1] int64, strictly increasing from 0 to P, on the
  // device of theta; its values are checked on the CPU only. Arithmetic in float32 (float64 for float64), see
  // math/merge.h: no overflow for any finite F, within the hull of the models, exact where they agree, the
  // exp(log_weight)-weighted mean where all F are 0, log-weights 100 ln 2 below their row's largest count as -inf; NaN
  // where a row holds NaN, +inf or only -inf.
  m.def("fused_merge(Tensor theta, Tensor? fisher, Tensor log_weight, Tensor offsets) -> Tensor");

  // The same into `out` [P], contiguous, of theta's dtype, apart from the inputs in memory.
  m.def("fused_merge.out(Tensor theta, Tensor? fisher, Tensor log_weight, Tensor offsets, *, Tensor(a!) out) -> ()");

  // result[s, t] = Σ_{p in s} grad[p] w_t (theta[t, p] - merged[p]) / Σ_j w_j, of log_weight's dtype; sums of float32
  // terms in float64 (on CUDA in float32 within a warp's tile, in float64 across tiles). grad [P] of theta's dtype, any
  // stride (0: the gradient of a sum). Rows add up to 0.
  m.def(
      "fused_merge_backward_log_weight(Tensor grad, Tensor theta, Tensor? fisher, Tensor log_weight, Tensor offsets)"
      " -> Tensor");

  // (grad w_t / Σw, grad exp(log_weight) (theta - merged) / Σw), each [T, P] contiguous, or [0] where not wanted. The
  // second is 0 where all F are 0, where the merge jumps.
  m.def(
      "fused_merge_backward_matrices(Tensor grad, Tensor theta, Tensor? fisher, Tensor log_weight, Tensor offsets,"
      " bool theta_wanted, bool fisher_wanted) -> (Tensor, Tensor)");

  // Log-weights from mixing logits [G, T] float32 or float64, row by row, less the row's largest:
  //     sigmoid: log σ(x)    softmax: x    ratios: log x (x >= 0; 0 leaves the model out)
  // CPU only: torch's own log-sigmoid gives other bits for another number of threads.
  m.def("log_weights(Tensor logits, str mixing) -> Tensor");

  // Its gradient; 0 for a ratio of 0.
  m.def("log_weights_backward(Tensor grad, Tensor logits, str mixing) -> Tensor");

  // acc[i] += scale Σ_j grads[j n + i]² for all i, n being the length of acc: one gradient of each, or those of several
  // examples one after another, added in their order. acc[i] contiguous float32, or float64 for float64 gradients, no
  // two overlapping; gradients of the same shape, float32, bfloat16, float16 or float64, all alike, all on one device.
  m.def("square_accumulate_(Tensor(a!)[] acc, Tensor[] grads, float scale) -> ()");

  // acc += scale Σ_b G_b², G_b being the gradient of example b alone with respect to the weight of a convolution of
  // input [B, I, ...] to an output whose gradient is grad [B, O, ...]; acc [O, I / groups, ...] contiguous. All
  // float32; on CUDA grad and input may both be bfloat16 or float16. Arithmetic in IEEE float32 (on CUDA, sums of
  // thousands of points in float64). On the CPU its bits depend on the instruction set (fused multiply-add).
  m.def(
      "conv_weight_grad_square_(Tensor(a!) acc, Tensor grad, Tensor input, int[] stride, int[] padding, int[] dilation,"
      " int groups, float scale) -> ()");

  // The gradient [O, I / groups, ...] with respect to the weight of a convolution of input [B, I, D, H, W] to an output
  // whose gradient is grad [B, O, D', H', W'], kernel being the weight's last three sizes: Σ_b G_b of the above.
  // grad and input float32 or bfloat16, the sums and the result float32; on the CPU only; its bits depend on the
  // instruction set (fused multiply-add).
  m.def(
      "conv3d_weight_gradient(Tensor grad, Tensor input, int[] kernel, int[] stride, int[] padding, int[] dilation,"
      " int groups) -> Tensor");

  // The convolution of each channel of input [B, C, D, H, W] by its own kernel, weight [C, 1, ...]. float32, on the CPU
  // only; its bits depend on the instruction set (fused multiply-add).
  m.def(
      "depthwise_conv3d(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation)"
      " -> Tensor");

  // The transposed convolution likewise, to an output of that size, of which the above makes the sizes of the input:
  // the gradient of the input of the above is that of the output's gradient. float32, on the CPU only; bits as above.
  m.def(
      "depthwise_conv_transpose3d(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding,"
      " int[] dilation, int[] size) -> Tensor");

  // (labels, scores): labels drawn from logits [B, K, ...], float32 or float64, and the gradient of their
  // log-likelihood with respect to the logits, of the logits' shape:
  //     bernoulli: label[b, r, v] = [u < σ(z)], score = label - σ(z); labels have the logits' shape
  //     categorical: label[b, v] = k with probability softmax(z)[k], score = onehot(label) - softmax(z); [B, ...]
  // labels are int64, [0] where not wanted. keys [B] int64, on the logits' device: the number u of each variable, in
  // the order of the logits' memory, depends on its example's key and its place alone (math/philox.h), also across
  // devices. CPU and CUDA may differ in the last bits of σ and softmax.
  m.def("sample_labels(Tensor logits, Tensor keys, str likelihood, bool labels_wanted) -> (Tensor, Tensor)");

  // (output, mean, variance), output = weight (input - mean) / sqrt(variance + epsilon) + bias. input [B, C, ...];
  // weight, bias [C], None stands for 1 and 0; mean and variance are those of each of the groups of neighbouring
  // channels of each example, [B groups], or of each channel of the batch, [C]. float32, sums of more than 64 terms in
  // float64; on the CPU only.
  m.def(
      "group_norm(Tensor input, Tensor? weight, Tensor? bias, int groups, float epsilon) -> (Tensor, Tensor, Tensor)");
  m.def("batch_norm(Tensor input, Tensor? weight, Tensor? bias, float epsilon) -> (Tensor, Tensor, Tensor)");

  // (grad_input, grad_weight [B, C], grad_bias [B, C], grad_slope [B, C]), the gradients, those of parameters example
  // by example, of a norm with its LeakyReLU: of leaky(weight (input - mean) / sqrt(variance + epsilon) + bias), where
  // leaky(a) = a above zero and slope a elsewhere. grad, input [B, C, ...]; mean and variance of what `over` says:
  // "groups", "batch" as above, or "nothing", constants [C], None standing for 0 and a deviation of 1; weight, bias
  // [C], slope [1] or [C], None stands for 1, 0 and 1; grad_slope is [0] where it is not wanted. float32, sums of more
  // than 256 terms in float64; on the CPU only.
  m.def(
      "norm_backward(Tensor grad, Tensor input, Tensor? mean, Tensor? variance, Tensor? weight, Tensor? bias,"
      " Tensor? slope, float epsilon, str over, bool slope_wanted) -> (Tensor, Tensor, Tensor, Tensor)");

  // The same of groups, for bfloat16 whose channels lie side by side: grad, input and the results of their shape
  // [B, points, C] bfloat16, all else float32, sums of more than 256 terms in float64, results rounded once; on the
  // CPU only. slope is one number.
  m.def(
      "channels_last_norm(Tensor input, Tensor? weight, Tensor? bias, int groups, float epsilon)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "channels_last_norm_backward(Tensor grad, Tensor input, Tensor mean, Tensor variance, Tensor? weight,"
      " Tensor? bias, float slope, float epsilon) -> (Tensor, Tensor, Tensor)");

  // The sums [B, C] float32 over the points of such a volume [B, points, C] bfloat16; on the CPU only.
  m.def("channels_last_sums(Tensor input) -> Tensor");

  // input [B, C, D, H, W] enlarged to [B, C, 2 D, 2 H, 2 W], every voxel to 2 x 2 x 2; float32, on the CPU only.
  m.def("upsample_nearest3d(Tensor input) -> Tensor");

  // The same by linear interpolation on each axis, corners not aligned, and its gradient: of that of the output,
  // [B, C, 2 D, 2 H, 2 W]. float32, on the CPU only.
  m.def("upsample_trilinear3d(Tensor input) -> Tensor");
  m.def("upsample_trilinear3d_backward(Tensor grad) -> Tensor");

  // The convolution of input [B, I, D, H, W] with weight [O, I, ...], for outputs of few points: memory for
  // I · taps · B · points numbers. Mirrored: with weight [I, O, ...], its taps taken backwards, which makes the
  // gradient of the input of that of the output where the stride is 1. float32, on the CPU only; its bits depend on the
  // instruction set (fused multiply-add).
  m.def(
      "small_conv3d(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation,"
      " bool mirrored) -> Tensor");

  // The gradient of an input of that size, of the output of a convolution of stride 2 with weight [O, I, 3, 3, 3], one
  // zero around; its own gradient is grad [B, O, D, H, W]. float32, on the CPU only; bits as above.
  m.def("strided_conv3d_input_gradient(Tensor grad, Tensor weight, int[] size) -> Tensor");

  // The convolution of stride 1 with weight [O, I, 3, 3, 3], one zero around, of what upsample_nearest3d makes of input
  // [B, I, D, H, W]. float32, on the CPU only; bits as above.
  m.def("upsampled_conv3d(Tensor input, Tensor weight, Tensor? bias) -> Tensor");

  // Of its output's gradient [B, O, 2 D, 2 H, 2 W], neighbour_sums3d makes [B, O, 2 D + 1, 2 H + 1, 2 W + 1]: the sums
  // of 2 x 2 x 2 neighbours, with zeros around. They give the gradient of input [B, I, D, H, W], and acc +=
  // scale Σ_b G_b² as above for the weight's.
  m.def("neighbour_sums3d(Tensor input) -> Tensor");
  m.def("upsampled_conv3d_input_gradient(Tensor sums, Tensor weight) -> Tensor");
  m.def("upsampled_conv3d_weight_grad_square_(Tensor(a!) acc, Tensor sums, Tensor input, float scale) -> ()");

  // The convolution of stride 1 of input [B, I, D, H, W] with weight [O, I, 1 or R, R, K] or, mirrored as above,
  // [I, O, 1 or R, R, K], R = 3 or 5, zeros around. float32, on the CPU only. Its bits depend on the instruction set
  // (fused multiply-add).
  m.def("winograd_conv3d(Tensor input, Tensor weight, Tensor? bias, int[] padding, bool mirrored) -> Tensor");

  // Opens the pool from which large results on the CPU take their memory (memory/cpu/memory_pool.h), or closes it
  // again; calls are counted. Without effect where PyTorch is older than 2.11 or the system is not Linux.
  m.def("keep_memory(bool on) -> ()");

  // Gives what is free in the pool back to the system, which may take it on its own where the pool is closed.
  m.def("release_memory() -> ()");

  // Bytes that the pool has from the system.
  m.def("kept_bytes() -> int");

  // An uninitialised tensor of the type and device of another one, contiguous, from that pool while it is open.
  m.def("new_tensor(Tensor like, int[] sizes) -> Tensor");
}

#define TIMM_EXT_BOX(operation) TORCH_BOX(&timm_ext::Guarded<&timm_ext::operation>::call)

#define TIMM_EXT_REGISTER_BOTH_DEVICES(m)                                                   \
  m.impl("conv_weight_grad_square_", TIMM_EXT_BOX(conv_weight_grad_square));                \
  m.impl("fused_merge", TIMM_EXT_BOX(fused_merge));                                         \
  m.impl("fused_merge.out", TIMM_EXT_BOX(fused_merge_out));                                 \
  m.impl("fused_merge_backward_log_weight", TIMM_EXT_BOX(fused_merge_backward_log_weight)); \
  m.impl("fused_merge_backward_matrices", TIMM_EXT_BOX(fused_merge_backward_matrices));     \
  m.impl("new_tensor", TIMM_EXT_BOX(new_tensor));                                           \
  m.impl("sample_labels", TIMM_EXT_BOX(sample_labels));                                     \
  m.impl("square_accumulate_", TIMM_EXT_BOX(square_accumulate))

STABLE_TORCH_LIBRARY_IMPL(timm_ext, CPU, m) {
  TIMM_EXT_REGISTER_BOTH_DEVICES(m);
  m.impl("batch_norm", TIMM_EXT_BOX(batch_norm));
  m.impl("channels_last_norm", TIMM_EXT_BOX(channels_last_norm));
  m.impl("channels_last_norm_backward", TIMM_EXT_BOX(channels_last_norm_backward));
  m.impl("channels_last_sums", TIMM_EXT_BOX(channels_last_sums));
  m.impl("conv3d_weight_gradient", TIMM_EXT_BOX(conv3d_weight_gradient));
  m.impl("depthwise_conv3d", TIMM_EXT_BOX(depthwise_conv3d));
  m.impl("depthwise_conv_transpose3d", TIMM_EXT_BOX(depthwise_conv_transpose3d));
  m.impl("group_norm", TIMM_EXT_BOX(group_norm));
  m.impl("log_weights", TIMM_EXT_BOX(log_weights));
  m.impl("log_weights_backward", TIMM_EXT_BOX(log_weights_backward));
  m.impl("neighbour_sums3d", TIMM_EXT_BOX(neighbour_sums3d));
  m.impl("norm_backward", TIMM_EXT_BOX(norm_backward));
  m.impl("small_conv3d", TIMM_EXT_BOX(small_conv3d));
  m.impl("strided_conv3d_input_gradient", TIMM_EXT_BOX(strided_conv3d_input_gradient));
  m.impl("upsample_nearest3d", TIMM_EXT_BOX(upsample_nearest3d));
  m.impl("upsample_trilinear3d", TIMM_EXT_BOX(upsample_trilinear3d));
  m.impl("upsample_trilinear3d_backward", TIMM_EXT_BOX(upsample_trilinear3d_backward));
  m.impl("upsampled_conv3d", TIMM_EXT_BOX(upsampled_conv3d));
  m.impl("upsampled_conv3d_input_gradient", TIMM_EXT_BOX(upsampled_conv3d_input_gradient));
  m.impl("upsampled_conv3d_weight_grad_square_", TIMM_EXT_BOX(upsampled_conv3d_weight_grad_square));
  m.impl("winograd_conv3d", TIMM_EXT_BOX(winograd_conv3d));
}

STABLE_TORCH_LIBRARY_IMPL(timm_ext, CompositeExplicitAutograd, m) {
  m.impl("keep_memory", TIMM_EXT_BOX(keep_memory));
  m.impl("kept_bytes", TIMM_EXT_BOX(kept_bytes));
  m.impl("release_memory", TIMM_EXT_BOX(release_memory));
}

STABLE_TORCH_LIBRARY_IMPL(timm_ext, CUDA, m) { TIMM_EXT_REGISTER_BOTH_DEVICES(m); }
