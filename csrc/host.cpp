// SPDX-License-Identifier: Apache-2.0
//
// The Python module `timm_ext._host`: what was built, the tile planner, and the kind of memory pages. No torch type
// crosses it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/block.h"
#include "cpu/isa.h"
#include "math/tiles.h"
#include "memory/cpu/pages.h"

namespace {

namespace py = pybind11;

py::dict build_info() {
  py::dict info;
  info["version"] = TIMM_EXT_VERSION;
  info["torch_built"] = TIMM_EXT_TORCH_VERSION;
  info["compiler"] = TIMM_EXT_COMPILER;
  info["cuda_built"] = TIMM_EXT_CUDA_BUILT != 0;
  info["cuda_version"] = TIMM_EXT_CUDA_VERSION;
  info["cuda_architectures"] = TIMM_EXT_CUDA_ARCHITECTURES;
  info["isa_built"] = timm_ext::cpu::built_isas();
  info["isa_chosen"] = timm_ext::cpu::chosen_isa();
  info["block"] = timm_ext::cpu::kBlock;
  return info;
}

void prefer_huge_pages(uintptr_t address, size_t bytes) {
  timm_ext::cpu::prefer_huge_pages(reinterpret_cast<void*>(address), bytes);
}

/// (block, segment, begin, end, cut) for every piece of work, in order.
std::vector<py::tuple> plan_tiles(const std::vector<int64_t>& offsets, int64_t block) {
  if (offsets.empty() || offsets.front() != 0 || block < 1) {
    throw std::invalid_argument("plan_tiles: expected offsets that start at 0 and block >= 1");
  }
  for (size_t s = 1; s < offsets.size(); ++s) {
    if (offsets[s] <= offsets[s - 1]) {
      throw std::invalid_argument("plan_tiles: expected strictly increasing offsets (got " +
                                  std::to_string(offsets[s - 1]) + " then " + std::to_string(offsets[s]) + ")");
    }
  }
  std::vector<py::tuple> pieces;
  const int64_t elements = offsets.back();
  for (int64_t begin = 0; begin < elements; begin += block) {
    const int64_t end = begin + block < elements ? begin + block : elements;
    timm_ext::math::for_each_piece(offsets.data(), static_cast<int64_t>(offsets.size()) - 1, begin, end,
                                   [&](const timm_ext::math::Piece& p) {
                                     pieces.push_back(py::make_tuple(begin / block, p.segment, p.begin, p.end, p.cut));
                                   });
  }
  return pieces;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Facts about the compiled library, its tile planner, and huge pages.";
  m.def("build_info", &build_info, "What the library was built from and which instruction set it uses.");
  m.def("plan_tiles", &plan_tiles, py::arg("offsets"), py::arg("block"),
        "Cut segments into pieces of blocks of a fixed size: (block, segment, begin, end, cut) in order.");
  m.def("prefer_huge_pages", &prefer_huge_pages, py::arg("address"), py::arg("bytes"),
        "Ask for huge pages under new memory, as a hint; it must be mapped, and its content stays.");
}
