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

/// Throws what is put together of the parts.
template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

/// TIMM_EXT_CHECK(condition, parts...): the parts of the message are looked at only where the condition does not hold.
#define TIMM_EXT_CHECK(condition, ...)               \
  do {                                               \
    if (!(condition)) ::timm_ext::fail(__VA_ARGS__); \
  } while (false)

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
  TIMM_EXT_CHECK(tensor.device() == reference.device(), op, ": ", name, " must be on the device of ", other, " (got ",
                 device_name(tensor), " vs ", device_name(reference), ")");
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType wanted, const char* why) {
  TIMM_EXT_CHECK(tensor.scalar_type() == wanted, op, ": ", name, " must be ", dtype_name(wanted), why, " (got ",
                 dtype_name(tensor.scalar_type()), ")");
}

/// The elements of a float32 tensor; of none, null.
inline const float* values_of(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
inline const float* values_of(const std::optional<Tensor>& tensor) { return tensor ? values_of(*tensor) : nullptr; }

/// Where those of a result go.
inline float* room_of(const Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

/// The memory of a tensor from its first element to its last.
struct Span {
  const char* begin;
  const char* end;  // where it begins, for a tensor without elements

  bool overlaps(const Span& other) const {
    return begin < end && other.begin < other.end && begin < other.end && other.begin < end;
  }
};

inline Span span_of(const Tensor& tensor) {
  const auto* const begin = static_cast<const char*>(tensor.const_data_ptr());
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return {begin, begin};
    last += (sizes[d] - 1) * strides[d];
  }
  return {begin, begin + (last + 1) * static_cast<int64_t>(tensor.element_size())};
}

inline bool overlap(const Tensor& a, const Tensor& b) { return span_of(a).overlaps(span_of(b)); }

}  // namespace timm_ext
