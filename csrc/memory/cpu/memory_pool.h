// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace timm_ext::cpu {

/// Memory of large blocks, kept for the next ones while the pool is open.
///
/// A pass of a network takes and frees the same sizes again and again. malloc, asked for an alignment, does not find a
/// hole of just the size (glibc), so that its heap keeps holes it cannot use; or it maps every block anew, whose pages
/// the system has to clear. The pool takes the smallest hole that fits, joins neighbouring ones, and grows by
/// mappings below one another. A closed pool hands out nothing, and the system may take what is free when it needs
/// memory; what it has not taken serves the next opening.
class MemoryPool {
 public:
  static constexpr size_t kLeast = size_t{1} << 16;  // of a block: smaller ones are malloc's

  /// That of the library; lives as long as the process, since blocks may outlive everything else.
  static MemoryPool& instance();

  MemoryPool() = default;
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;

  /// Calls are counted: it is open until as many closed it.
  void open();
  void close();

  /// A block aligned to a page, or null: the pool is closed, the block small, or the system has no more.
  void* take(size_t bytes);

  /// Back from its user, with the size that was asked for, from any thread, also when the pool is closed.
  void give(void* data, size_t bytes);

  /// Gives what is free back to the system at once.
  void release();

  /// Bytes mapped: in use and free.
  size_t held() const;

 private:
  /// A fork waits until no thread is in the pool: the child has no other thread that would leave it.
  static void keep_whole_in_forks();

  using Holes = std::map<char*, size_t>;  // size by address; neighbours are joined

  bool grow(size_t bytes);
  void add_hole(char* begin, size_t bytes);
  void remove_hole(Holes::iterator hole);
  void unmap(Holes::iterator hole);

  mutable std::mutex mutex_;
  int open_ = 0;
  size_t held_ = 0;
  char* lowest_ = nullptr;  // where the last mapping begins
  Holes holes_;
  std::set<std::pair<size_t, char*>> by_size_;
};

}  // namespace timm_ext::cpu
