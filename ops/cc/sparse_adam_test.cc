#include "ops/cc/sparse_adam.h"

#include <cmath>
#include <cstdint>
#include <vector>

#include "ops/cc/check.h"

namespace qianmo {
namespace {

void GroupsKeepTheOrderOfAppearance() {
  constexpr int64_t kLarge = int64_t{1} << 62;
  const std::vector<int64_t> indices = {7, 3, 7, kLarge, 3, 7};
  const RowGroups groups = GroupRows(indices.data(), 6, kLarge + 1);
  CHECK((groups.rows == std::vector<int64_t>{7, 3, kLarge}));
  CHECK((groups.first == std::vector<int32_t>{0, 1, 3}));
  CHECK((groups.next == std::vector<int32_t>{2, 4, 5, -1, -1, -1}));
}

void NothingIsGroupedToNothing() {
  const RowGroups groups = GroupRows(nullptr, 0, 9);
  CHECK(groups.rows.empty());
  SparseAdamRows(groups, 0, 0, nullptr, 4, AdamStep{}, nullptr, nullptr,
                 nullptr);
}

// Rows that differ by powers of two are what a poor hash sends to one slot.
void GroupsAreRightForManyRows() {
  for (const int shift : {0, 1, 20, 40}) {
    const int32_t n = 5000, distinct = 1700;
    std::vector<int64_t> indices(n);
    for (int32_t i = 0; i < n; ++i) {
      indices[i] = int64_t{i % distinct} << shift;
    }
    const RowGroups groups =
        GroupRows(indices.data(), n, int64_t{distinct} << shift);
    CHECK(groups.rows.size() == distinct);
    for (int32_t g = 0; g < distinct; ++g) {
      int32_t expected = g;
      for (int32_t at = groups.first[g]; at != RowGroups::kNone;
           at = groups.next[at]) {
        CHECK(at == expected);
        expected += distinct;
      }
      CHECK(expected >= n);
    }
  }
}

void RangesMayBeSharedInAnyWay() {
  const AdamStep step = {0.01f, 0.1f, 0.001f, 1e-7f};
  const std::vector<int64_t> indices = {4, 0, 4, 2, 4, 0};
  for (const int64_t dim : {1, 3, 16, 17}) {
    std::vector<float> gradients(6 * dim);
    for (size_t i = 0; i < gradients.size(); ++i) {
      gradients[i] = std::sin(static_cast<float>(i) + 1);
    }
    std::vector<float> w(6 * dim, 1), m(6 * dim, 0.5f), v(6 * dim, 0.25f);
    std::vector<float> w2 = w, m2 = m, v2 = v;
    const RowGroups groups = GroupRows(indices.data(), 6, 6);
    SparseAdamRows(groups, 0, 3, gradients.data(), dim, step, w.data(),
                   m.data(), v.data());
    for (int64_t g = 2; g >= 0; --g) {
      SparseAdamRows(groups, g, g + 1, gradients.data(), dim, step, w2.data(),
                     m2.data(), v2.data());
    }
    CHECK(w == w2 && m == m2 && v == v2);
    for (int64_t d = 0; d < dim; ++d) {
      const float sum =
          gradients[d] + gradients[2 * dim + d] + gradients[4 * dim + d];
      CHECK(std::abs(m[4 * dim + d] - (0.45f + 0.1f * sum)) < 1e-6f);
      CHECK(w[4 * dim + d] != 1);
      for (const int64_t row : {1, 3, 5}) {
        CHECK(w[row * dim + d] == 1);
        CHECK(m[row * dim + d] == 0.5f);
        CHECK(v[row * dim + d] == 0.25f);
      }
    }
  }
}

}  // namespace
}  // namespace qianmo

int main() {
  qianmo::GroupsKeepTheOrderOfAppearance();
  qianmo::NothingIsGroupedToNothing();
  qianmo::GroupsAreRightForManyRows();
  qianmo::RangesMayBeSharedInAnyWay();
}
