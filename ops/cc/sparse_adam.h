// The update of layers/sparse_adam.py, without TensorFlow's types.

#ifndef QIANMO_OPS_CC_SPARSE_ADAM_H_
#define QIANMO_OPS_CC_SPARSE_ADAM_H_

#include <cstdint>
#include <vector>

namespace qianmo {

// The distinct values of a list, in the order in which they first appear, and
// where each one stands in it: rows[i] stands at positions[starts[i]] ...
// positions[starts[i + 1] - 1], which ascend.
struct RowGroups {
  std::vector<int64_t> rows;
  std::vector<int32_t> starts;
  std::vector<int32_t> positions;
};

// Groups indices[0] ... indices[n - 1]; the cost depends on n alone.
RowGroups GroupRows(const int64_t* indices, int32_t n);

// Numbers of one step; `alpha` is the bias-corrected rate.
struct AdamStep {
  float alpha;
  float one_minus_beta_1;
  float one_minus_beta_2;
  float epsilon;
};

// Sums the gradients [n, dim] of each row groups.rows[begin] ...
// groups.rows[end - 1], in their order, and moves these rows of w, m and v
// [num_rows, dim]. Disjoint ranges touch disjoint rows, so threads may share a
// step in any way without changing a bit of the result.
void SparseAdamRows(const RowGroups& groups, int64_t begin, int64_t end,
                    const float* gradients, int64_t dim, const AdamStep& step,
                    float* w, float* m, float* v);

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_SPARSE_ADAM_H_
