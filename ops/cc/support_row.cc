#include "ops/cc/support_row.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace qianmo {
namespace {

constexpr size_t kWord = 8;

bool AllFinite(const float* values, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    if (!std::isfinite(values[i])) return false;
  }
  return true;
}

RowHead HeadOf(const char* row) {
  RowHead head;
  std::memcpy(&head, row, sizeof(head));
  return head;
}

}  // namespace

size_t SupportShape::row_bytes() const {
  const size_t floats = dim + 2 * static_cast<size_t>(num_labels);
  return (sizeof(RowHead) + floats * sizeof(float) + kWord - 1) / kWord * kWord;
}

int32_t PackRow(const SupportShape& shape, const float* h, const float* labels,
                const float* weights, int64_t time, int64_t event,
                int64_t version, char* row) {
  const size_t dim = shape.dim, num_labels = shape.num_labels;
  int32_t status = kStored;
  if (time <= 0) status |= kBadTime;
  if (!AllFinite(h, dim)) status |= kBadVector;
  for (size_t i = 0; i < num_labels; ++i) {
    const bool good =
        weights[i] == 0 || (weights[i] > 0 && std::isfinite(weights[i]) &&
                            std::isfinite(labels[i]));
    if (!good) status |= kBadLabel;
  }
  if (status != kStored) return status;

  std::memset(row, 0, shape.row_bytes());
  const RowHead head = {time, event, version, 0};
  std::memcpy(row, &head, sizeof(head));
  char* floats = row + sizeof(head);
  std::memcpy(floats, h, dim * sizeof(float));
  floats += dim * sizeof(float);
  for (size_t i = 0; i < num_labels; ++i) {
    const float label = weights[i] == 0 ? 0 : labels[i];
    std::memcpy(floats + i * sizeof(float), &label, sizeof(float));
  }
  floats += num_labels * sizeof(float);
  std::memcpy(floats, weights, num_labels * sizeof(float));
  return kStored;
}

int32_t UnpackRows(const SupportShape& shape, const char* rows,
                   int32_t num_rows, int64_t version, int64_t until,
                   int32_t max_rows, float* h, float* labels, float* weights,
                   int64_t* time, int64_t* event, int64_t* refused) {
  const size_t row_bytes = shape.row_bytes();
  int32_t usable = 0;
  for (int32_t i = 0; i < num_rows; ++i) {
    const RowHead head = HeadOf(rows + i * row_bytes);
    if (head.written <= until) continue;
    if (head.version == version) {
      ++usable;
    } else {
      ++*refused;
    }
  }

  const size_t dim = shape.dim, num_labels = shape.num_labels;
  int32_t skip = std::max(usable - max_rows, 0);
  const int32_t count = usable - skip;
  for (int32_t i = 0, to = 0; to < count; ++i) {
    const char* const row = rows + i * row_bytes;
    const RowHead head = HeadOf(row);
    if (head.written <= until || head.version != version || skip-- > 0) {
      continue;
    }
    const char* const floats = row + sizeof(RowHead);
    std::memcpy(h + to * dim, floats, dim * sizeof(float));
    std::memcpy(labels + to * num_labels, floats + dim * sizeof(float),
                num_labels * sizeof(float));
    std::memcpy(weights + to * num_labels,
                floats + (dim + num_labels) * sizeof(float),
                num_labels * sizeof(float));
    time[to] = head.time;
    event[to++] = head.event;
  }
  return count;
}

}  // namespace qianmo
