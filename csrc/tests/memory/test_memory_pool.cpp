// SPDX-License-Identifier: Apache-2.0
//
// The memory pool: blocks that are in use never overlap, holes are used again, and what is free can go back.
#include <cstdint>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "memory/cpu/memory_pool.h"
#include "tests/check.h"

namespace {

using timm_ext::cpu::MemoryPool;
using timm_ext::test::check;

constexpr size_t kMegabyte = size_t{1} << 20;

struct Block {
  unsigned char* data;
  size_t bytes;
  unsigned char mark;
};

Block take(MemoryPool& pool, size_t bytes, unsigned char mark) {
  auto* const data = static_cast<unsigned char*>(pool.take(bytes));
  check(data != nullptr, "no block of %zu bytes", bytes);
  check(reinterpret_cast<uintptr_t>(data) % 64 == 0, "a block is not aligned");
  std::memset(data, mark, bytes);
  return {data, bytes, mark};
}

/// Whether nobody else has written to it.
void give(MemoryPool& pool, const Block& block) {
  for (const size_t i : {size_t{0}, block.bytes / 2, block.bytes - 1}) {
    check(block.data[i] == block.mark, "byte %zu of %zu holds %d, not %d", i, block.bytes, block.data[i], block.mark);
  }
  pool.give(block.data, block.bytes);
}

void check_closed_and_small() {
  MemoryPool pool;
  check(pool.take(kMegabyte) == nullptr, "a closed pool gave a block");
  pool.open();
  check(pool.take(MemoryPool::kLeast - 1) == nullptr, "a small block came from the pool");
  check(pool.held() == 0, "the pool holds %zu bytes without a block", pool.held());
  check(pool.take(size_t{1} << 62) == nullptr, "there was more memory than can be");
  pool.close();
}

void check_same_sizes_need_no_more() {
  MemoryPool pool;
  pool.open();
  size_t held = 0;
  for (int pass = 0; pass < 5; ++pass) {
    std::vector<Block> blocks;
    for (unsigned char i = 0; i < 12; ++i) blocks.push_back(take(pool, (1 + i % 5) * kMegabyte + 12345, i));
    for (const Block& block : blocks) give(pool, block);
    if (pass == 0) held = pool.held();
    check(pool.held() == held, "pass %d holds %zu bytes, the first %zu", pass, pool.held(), held);
  }
  check(held <= 48 * kMegabyte, "%zu bytes held for 33 MiB", held);
  // Neighbours have been joined again: one block fits where many were.
  give(pool, take(pool, 32 * kMegabyte, 1));
  check(pool.held() == held, "a whole of all parts took %zu bytes more", pool.held() - held);
  pool.close();
  check(pool.take(kMegabyte) == nullptr, "a closed pool gave a block");
  pool.open();
  give(pool, take(pool, 32 * kMegabyte, 2));
  check(pool.held() == held, "opened again, it took %zu bytes more", pool.held() - held);
  pool.close();
  pool.release();
  check(pool.held() == 0, "%zu bytes held after the release", pool.held());
}

void check_blocks_outlive_it() {
  MemoryPool pool;
  pool.open();
  pool.open();
  const Block first = take(pool, 3 * kMegabyte, 1), second = take(pool, 5 * kMegabyte, 2);
  pool.close();
  give(pool, take(pool, kMegabyte, 3));
  pool.release();
  check(pool.held() >= 8 * kMegabyte && pool.held() < 9 * kMegabyte, "%zu bytes held for 8 MiB", pool.held());
  const Block third = take(pool, kMegabyte, 4);
  pool.close();
  give(pool, third);
  give(pool, first);
  pool.release();
  check(pool.held() >= 5 * kMegabyte && pool.held() < 6 * kMegabyte, "%zu bytes held for 5 MiB", pool.held());
  give(pool, second);
  pool.release();
  check(pool.held() == 0, "%zu bytes held for nothing", pool.held());
  pool.close();  // once too often: nothing
  pool.open();
  check(pool.take(kMegabyte) != nullptr, "a pool closed too often does not open");
}

void take_and_give(MemoryPool& pool, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<Block> blocks;
  for (int step = 0; step < 3000; ++step) {
    if (blocks.size() < 20 && random() % 2 == 0) {
      const size_t bytes = MemoryPool::kLeast + random() % kMegabyte;
      blocks.push_back(take(pool, bytes, static_cast<unsigned char>(random())));
    } else if (!blocks.empty()) {
      std::swap(blocks[random() % blocks.size()], blocks.back());
      give(pool, blocks.back());
      blocks.pop_back();
    }
  }
  for (const Block& block : blocks) give(pool, block);
}

void check_any_order_in_threads() {
  MemoryPool pool;
  pool.open();
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 4; ++seed) threads.emplace_back([&pool, seed] { take_and_give(pool, seed); });
  for (std::thread& thread : threads) thread.join();
  check(pool.held() < 4 * 20 * 2 * kMegabyte, "%zu bytes held for 80 blocks of at most 1.1 MiB", pool.held());
  pool.close();
  pool.release();
  check(pool.held() == 0, "%zu bytes held after the release", pool.held());
}

}  // namespace

int main() {
  check_closed_and_small();
  check_same_sizes_need_no_more();
  check_blocks_outlive_it();
  check_any_order_in_threads();
  return timm_ext::test::result();
}
