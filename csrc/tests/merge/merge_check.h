// SPDX-License-Identifier: Apache-2.0
//
// What the merge kernels must give, wherever they ran: the cases, and the bounds on their results.
#pragma once

#include <vector>

#include "tests/merge/merge_case.h"

namespace timm_ext::test {

/// Every element type and instance of T over sizes, kinds of segments and Fishers, strides and alignments that rotate.
std::vector<CaseSpec> case_table();

/// `merged` [P], `rows` [S, T] and the matrices of `outputs` are host memory.
void check_merged(const MergeCase& c, const Reference& truth, const void* merged);
void check_rows(const MergeCase& c, const Reference& truth, const void* rows);
void check_matrices(const MergeCase& c, const Reference& truth, const MergeMatrixGradients& outputs);

}  // namespace timm_ext::test
