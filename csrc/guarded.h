// SPDX-License-Identifier: Apache-2.0
//
// Operators whose failures say what was wrong: an error that comes through the stable ABI names a call alone.
#pragma once

#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

// Of newer libraries; null in an older one. Declared here since the headers hide it at version 2.10.
extern "C" __attribute__((weak, visibility("default"))) const char* torch_exception_get_what_without_backtrace();

namespace timm_ext {

[[noreturn]] inline void throw_for_want_of_memory(const std::string& what) {
  throw std::runtime_error(
      "timm_ext: an operator must have memory for its result, copies that lie side by side and buffers (got: " + what +
      ")");
}

/// Throws what is being handled, in words.
[[noreturn]] inline void explain_failure() {
  try {
    throw;
  } catch (const std::bad_alloc&) {
    throw_for_want_of_memory("none left");
  } catch (const std::length_error&) {
    throw_for_want_of_memory("a size beyond all memory");
  } catch (const std::exception& error) {
    const bool bare = std::string(error.what()).find("API call failed") != std::string::npos;
    if (!bare || torch_exception_get_what_without_backtrace == nullptr) throw;
    const std::string inner = torch_exception_get_what_without_backtrace();
    const std::string line = inner.substr(0, inner.find('\n'));
    if (line.find("bad_alloc") != std::string::npos) throw_for_want_of_memory("none left");
    if (line.find("alloc") != std::string::npos) throw_for_want_of_memory(line);
    throw std::runtime_error("timm_ext: PyTorch must take a call of an operator (got: " + line + ")");
  }
}

template <auto operation>
struct Guarded;

template <class Result, class... Arguments, Result (*operation)(Arguments...)>
struct Guarded<operation> {
  static Result call(Arguments... arguments) {
    try {
      return operation(std::forward<Arguments>(arguments)...);
    } catch (...) {
      explain_failure();
    }
  }
};

}  // namespace timm_ext
