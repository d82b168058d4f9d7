// Rows of the support store as bytes, in memory, in files and in a Redis.
//
// A row is a RowHead, then float32 h [dim], labels [num_labels] and weights
// [num_labels], padded to 8 bytes. Numbers are little-endian.

#ifndef QIANMO_OPS_CC_SUPPORT_ROW_H_
#define QIANMO_OPS_CC_SUPPORT_ROW_H_

#include <cstddef>
#include <cstdint>

namespace qianmo {

constexpr int32_t kMaxTaskRows = 4096;

// What all rows of a store have in common.
struct SupportShape {
  int32_t dim;         // of h
  int32_t num_labels;  // and of label weights
  int32_t max_rows;    // of a task, up to kMaxTaskRows

  size_t row_bytes() const;
};

struct RowHead {
  int64_t time;     // of the event
  int64_t event;    // id; a task has one row for each time and id
  int64_t version;  // of the bottom that made h
  int64_t written;  // wall clock, microseconds since 1970
};

// Whether a row is of a later event than another, or of one of a greater id at
// the same time.
inline bool Later(const RowHead& one, const RowHead& two) {
  return one.time != two.time ? one.time > two.time : one.event > two.event;
}

// What keeps a store small; 0 means without bound.
struct SupportLimits {
  int64_t ttl_micros = 0;  // rows written longer ago are not read
  int64_t max_tasks = 0;
  int64_t max_bytes = 0;
};

// Why a row was not stored: 0 or some of these bits.
enum SupportStatus : int32_t {
  kStored = 0,
  kBadTime = 1,    // the event time is not positive
  kBadVector = 2,  // h is not finite
  kBadLabel = 4,   // a label or weight is not finite, or a weight is negative
  kTooOld = 8,     // the task is full of rows of later events
  kNoMemory = 16,
  kUnreachable = 32,  // the Redis did not store it
};

// Writes a row, whose time of writing is 0. Where a weight is 0 the label is
// undefined, and may be anything. Returns a SupportStatus; of a bad row nothing
// is written.
int32_t PackRow(const SupportShape& shape, const float* h, const float* labels,
                const float* weights, int64_t time, int64_t event,
                int64_t version, char* row);

// Copies the last of a task's rows that are of `version` and were written after
// `until`, the newest last, at most `max_rows`. Returns their number, and
// counts those of other versions.
int32_t UnpackRows(const SupportShape& shape, const char* rows,
                   int32_t num_rows, int64_t version, int64_t until,
                   int32_t max_rows, float* h, float* labels, float* weights,
                   int64_t* time, int64_t* event, int64_t* refused);

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_SUPPORT_ROW_H_
