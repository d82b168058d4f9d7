#include "ops/cc/sparse_adam.h"

#include <cmath>

namespace qianmo {

RowGroups GroupRows(const int64_t* indices, int32_t n) {
  RowGroups groups;
  groups.rows.reserve(n);
  std::vector<int32_t> group_of(n), sizes;
  sizes.reserve(n);

  // Open addressing, at most half full; a slot holds a group's number.
  int bits = 4;
  while ((int64_t{1} << bits) < 2 * int64_t{n}) ++bits;
  const uint64_t mask = (uint64_t{1} << bits) - 1;
  constexpr int32_t kEmpty = -1;
  std::vector<int32_t> slots(mask + 1, kEmpty);
  for (int32_t i = 0; i < n; ++i) {
    const int64_t row = indices[i];
    // Fibonacci hashing: the high bits of the product depend on all bits.
    uint64_t at =
        (static_cast<uint64_t>(row) * 0x9E3779B97F4A7C15u) >> (64 - bits);
    while (slots[at] != kEmpty && groups.rows[slots[at]] != row) {
      at = (at + 1) & mask;
    }
    if (slots[at] == kEmpty) {
      slots[at] = static_cast<int32_t>(groups.rows.size());
      groups.rows.push_back(row);
      sizes.push_back(0);
    }
    group_of[i] = slots[at];
    ++sizes[slots[at]];
  }

  groups.starts.resize(sizes.size() + 1);
  groups.starts[0] = 0;
  for (size_t g = 0; g < sizes.size(); ++g) {
    groups.starts[g + 1] = groups.starts[g] + sizes[g];
  }
  std::vector<int32_t> next(groups.starts.begin(), groups.starts.end() - 1);
  groups.positions.resize(n);
  for (int32_t i = 0; i < n; ++i) groups.positions[next[group_of[i]]++] = i;
  return groups;
}

void SparseAdamRows(const RowGroups& groups, int64_t begin, int64_t end,
                    const float* gradients, int64_t dim, const AdamStep& step,
                    float* w, float* m, float* v) {
  std::vector<float> buffer(dim);
  float* const sum = buffer.data();
  for (int64_t group = begin; group < end; ++group) {
    const int32_t* position = &groups.positions[groups.starts[group]];
    const int32_t* const last = &groups.positions[0] + groups.starts[group + 1];
    const float* g = gradients + *position * dim;
    if (last - position > 1) {
      for (int64_t d = 0; d < dim; ++d) sum[d] = g[d];
      while (++position != last) {
        const float* const more = gradients + *position * dim;
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
