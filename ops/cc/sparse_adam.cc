#include "ops/cc/sparse_adam.h"

#include <cmath>

namespace qianmo {

RowGroups GroupRows(const int64_t* indices, int32_t n, int64_t num_rows) {
  constexpr int32_t kNone = RowGroups::kNone;
  RowGroups groups;
  groups.rows.reserve(n);
  groups.first.reserve(n);
  groups.next.assign(n, kNone);
  std::vector<int32_t> last;
  last.reserve(n);

  // Open addressing, at most half full; a slot holds a group's number. When
  // there is a slot for each row, rows are their own slots. Otherwise the high
  // bits of the product depend on all bits of the row (Fibonacci hashing).
  int bits = 4;
  while ((int64_t{1} << bits) < 2 * int64_t{n}) ++bits;
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  const bool direct = num_rows <= static_cast<int64_t>(mask);
  const uint64_t factor = direct ? 1 : 0x9E3779B97F4A7C15u;
  const int shift = direct ? 0 : 64 - bits;
  std::vector<int32_t> slots(mask + 1, kNone);
  for (int32_t i = 0; i < n; ++i) {
    const int64_t row = indices[i];
    uint64_t at = (static_cast<uint64_t>(row) * factor) >> shift;
    while (slots[at] != kNone && groups.rows[slots[at]] != row) {
      at = (at + 1) & mask;
    }
    const int32_t group = slots[at];
    if (group == kNone) {
      slots[at] = static_cast<int32_t>(groups.rows.size());
      groups.rows.push_back(row);
      groups.first.push_back(i);
      last.push_back(i);
    } else {
      groups.next[last[group]] = i;
      last[group] = i;
    }
  }
  return groups;
}

void SparseAdamRows(const RowGroups& groups, int64_t begin, int64_t end,
                    const float* gradients, int64_t dim, const AdamStep& step,
                    float* w, float* m, float* v) {
  std::vector<float> buffer(dim);
  float* const sum = buffer.data();
  for (int64_t group = begin; group < end; ++group) {
    int32_t place = groups.first[group];
    const float* g = gradients + place * dim;
    if ((place = groups.next[place]) != RowGroups::kNone) {
      for (int64_t d = 0; d < dim; ++d) sum[d] = g[d];
      for (; place != RowGroups::kNone; place = groups.next[place]) {
        const float* const more = gradients + place * dim;
        for (int64_t d = 0; d < dim; ++d) sum[d] += more[d];
      }
      g = sum;
    }
    const int64_t at = groups.rows[group] * dim;
    float* __restrict__ const w_row = w + at;
    float* __restrict__ const m_row = m + at;
    float* __restrict__ const v_row = v + at;
    for (int64_t d = 0; d < dim; ++d) {
      m_row[d] += step.one_minus_beta_1 * (g[d] - m_row[d]);
      v_row[d] += step.one_minus_beta_2 * (g[d] * g[d] - v_row[d]);
      w_row[d] -= step.alpha * m_row[d] / (std::sqrt(v_row[d]) + step.epsilon);
    }
  }
}

}  // namespace qianmo
