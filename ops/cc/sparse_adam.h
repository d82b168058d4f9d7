// The update of layers/sparse_adam.py, without TensorFlow's types.

#ifndef QIANMO_OPS_CC_SPARSE_ADAM_H_
#define QIANMO_OPS_CC_SPARSE_ADAM_H_

#include <cstdint>
#include <vector>

namespace qianmo {

// Which places of a list name the same row: rows[g] stands first at first[g],
// and then at next[first[g]], next[next[first[g]]] and so on, up to kNone. Rows
// are in the order in which they first appear, places ascend.
struct RowGroups {
  static constexpr int32_t kNone = -1;
  std::vector<int64_t> rows;
  std::vector<int32_t> first;
  std::vector<int32_t> next;
};

// Groups indices[0] ... indices[n - 1], all in [0, num_rows). The cost depends
// on n alone.
RowGroups GroupRows(const int64_t* indices, int32_t n, int64_t num_rows);

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
