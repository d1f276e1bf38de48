// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <vector>

namespace timm_ext::cpu {

/// Names of the instruction sets in this build, plainest first.
std::vector<std::string> built_isas();

/// The last of built_isas() that this CPU runs, or the one named by the environment variable TIMM_EXT_ISA; throws
/// std::runtime_error where that one is unknown or not supported by the CPU.
std::string chosen_isa();

/// Its place among built_isas(), found once.
int chosen_isa_number();

}  // namespace timm_ext::cpu
