// SPDX-License-Identifier: Apache-2.0
//
// Argument checks of the operators. Every message reads "op: X must ... (got ...)".
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

#include "math/element.h"

namespace timm_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string dtype_name(ScalarType type) {
  static constexpr std::pair<ScalarType, const char*> kNames[] = {
      {ScalarType::Byte, "uint8"},
      {ScalarType::Char, "int8"},
      {ScalarType::Short, "int16"},
      {ScalarType::Int, "int32"},
      {ScalarType::Long, "int64"},
      {ScalarType::UInt16, "uint16"},
      {ScalarType::UInt32, "uint32"},
      {ScalarType::UInt64, "uint64"},
      {ScalarType::Bool, "bool"},
      {ScalarType::Half, "float16"},
      {ScalarType::BFloat16, "bfloat16"},
      {ScalarType::Float, "float32"},
      {ScalarType::Double, "float64"},
      {ScalarType::Float8_e5m2, "float8_e5m2"},
      {ScalarType::Float8_e4m3fn, "float8_e4m3fn"},
      {ScalarType::Float8_e5m2fnuz, "float8_e5m2fnuz"},
      {ScalarType::Float8_e4m3fnuz, "float8_e4m3fnuz"},
      {ScalarType::ComplexHalf, "complex32"},
      {ScalarType::ComplexFloat, "complex64"},
      {ScalarType::ComplexDouble, "complex128"},
  };
  for (const auto& [known, name] : kNames) {
    if (known == type) return name;
  }
  return "dtype " + std::to_string(static_cast<int>(type));
}

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return tensor.is_cuda() ? "cuda:" + std::to_string(tensor.get_device_index()) : "another device";
}

inline std::string list(torch::headeronly::IntHeaderOnlyArrayRef values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  return text + "]";
}

/// Kernel storage type of a floating dtype, or nothing.
inline std::optional<Element> element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    case ScalarType::Double:
      return Element::kFloat64;
    default:
      return std::nullopt;
  }
}

/// The type sums are kept in: float32, or float64 for float64.
inline ScalarType arithmetic_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const char* other,
                              const Tensor& reference) {
  check(tensor.device() == reference.device(), op, ": ", name, " must be on the device of ", other, " (got ",
        device_name(tensor), " vs ", device_name(reference), ")");
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType wanted, const char* why) {
  check(tensor.scalar_type() == wanted, op, ": ", name, " must be ", dtype_name(wanted), why, " (got ",
        dtype_name(tensor.scalar_type()), ")");
}

/// Whether the memory of two tensors overlaps, taking each as the span from its first to its last element.
inline bool overlap(const Tensor& a, const Tensor& b) {
  const auto end = [](const Tensor& t) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    return static_cast<const char*>(t.const_data_ptr()) + (last + 1) * static_cast<int64_t>(t.element_size());
  };
  if (a.numel() == 0 || b.numel() == 0) return false;
  return static_cast<const char*>(a.const_data_ptr()) < end(b) && static_cast<const char*>(b.const_data_ptr()) < end(a);
}

}  // namespace timm_ext
