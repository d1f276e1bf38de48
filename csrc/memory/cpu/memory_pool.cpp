// SPDX-License-Identifier: Apache-2.0
#include "memory/cpu/memory_pool.h"

#if defined(__linux__)
#include <pthread.h>
#endif

#include <iterator>
#include <limits>

#include "memory/cpu/pages.h"

namespace timm_ext::cpu {
namespace {

constexpr size_t kPage = size_t{1} << 16;  // of the largest pages in use without huge ones
constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kGrowth = size_t{1} << 24;  // at least; a multiple of a huge page

constexpr size_t kMost = std::numeric_limits<size_t>::max() / 2;  // which may be rounded up

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

#if defined(__linux__)
char* map_pages(char* wish, size_t bytes) {
  void* const pages = mmap(wish, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return pages == MAP_FAILED ? nullptr : static_cast<char*>(pages);
}

/// New huge pages, at the place that is wished for where it is free; null where there are none.
char* map_huge_pages(char* wish, size_t bytes) {
  char* begin = map_pages(wish, bytes);
  if (begin == nullptr) return nullptr;
  if (begin != wish) {
    (void)munmap(begin, bytes);
    char* const more = map_pages(nullptr, bytes + kHugePage);
    if (more == nullptr) return nullptr;
    begin = more + (kHugePage - reinterpret_cast<uintptr_t>(more) % kHugePage) % kHugePage;
    if (begin > more) (void)munmap(more, begin - more);
    (void)munmap(begin + bytes, more + kHugePage - begin);
  }
  prefer_huge_pages(begin, bytes);
  return begin;
}

/// Pages whose content nobody needs: the system may take them when it needs memory.
void offer_pages(char* begin, size_t bytes) {
  if (madvise(begin, bytes, MADV_FREE) != 0) (void)madvise(begin, bytes, MADV_DONTNEED);
}
#else
char* map_huge_pages(char*, size_t) { return nullptr; }
void offer_pages(char*, size_t) {}
#endif

}  // namespace

MemoryPool& MemoryPool::instance() {
  static MemoryPool* const pool = [] {
    auto* const made = new MemoryPool;
    keep_whole_in_forks();
    return made;
  }();
  return *pool;
}

void MemoryPool::keep_whole_in_forks() {
#if defined(__linux__)
  (void)pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                       [] { instance().mutex_.unlock(); });
#endif
}

void MemoryPool::open() {
  const std::lock_guard<std::mutex> lock(mutex_);
  ++open_;
}

void MemoryPool::close() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (open_ == 0 || --open_ > 0) return;
  for (const auto& [begin, bytes] : holes_) offer_pages(begin, bytes);
}

void MemoryPool::release() {
  const std::lock_guard<std::mutex> lock(mutex_);
  while (!holes_.empty()) unmap(holes_.begin());
}

void* MemoryPool::take(size_t bytes) {
  if (bytes < kLeast || bytes > kMost) return nullptr;
  const size_t size = rounded(bytes, kPage);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (open_ == 0) return nullptr;
  auto fitting = by_size_.lower_bound({size, nullptr});
  if (fitting == by_size_.end()) {
    if (!grow(size)) return nullptr;
    fitting = by_size_.lower_bound({size, nullptr});
  }
  // From the upper end: what has not been touched yet lies below, where the pool grows.
  const auto [whole, begin] = *fitting;
  remove_hole(holes_.find(begin));
  if (whole > size) add_hole(begin, whole - size);
  return begin + (whole - size);
}

void MemoryPool::give(void* data, size_t bytes) {
  char* const begin = static_cast<char*>(data);
  const size_t size = rounded(bytes, kPage);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (open_ == 0) offer_pages(begin, size);
  add_hole(begin, size);
}

size_t MemoryPool::held() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return held_;
}

bool MemoryPool::grow(size_t bytes) {
  const size_t size = rounded(bytes, kGrowth);
  char* const wish = lowest_ == nullptr ? nullptr : lowest_ - size;
  char* const begin = map_huge_pages(wish, size);
  if (begin == nullptr) return false;
  held_ += size;
  lowest_ = begin;
  add_hole(begin, size);
  return true;
}

void MemoryPool::add_hole(char* begin, size_t bytes) {
  auto next = holes_.lower_bound(begin);
  if (next != holes_.end() && begin + bytes == next->first) {
    bytes += next->second;
    const auto joined = next++;
    remove_hole(joined);
  }
  if (next != holes_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == begin) {
      begin = before->first;
      bytes += before->second;
      remove_hole(before);
    }
  }
  by_size_.insert({bytes, begin});
  holes_.emplace(begin, bytes);
}

void MemoryPool::remove_hole(Holes::iterator hole) {
  by_size_.erase({hole->second, hole->first});
  holes_.erase(hole);
}

void MemoryPool::unmap(Holes::iterator hole) {
#if defined(__linux__)
  if (munmap(hole->first, hole->second) == 0) held_ -= hole->second;
#endif
  remove_hole(hole);
  if (held_ == 0) lowest_ = nullptr;
}

}  // namespace timm_ext::cpu
