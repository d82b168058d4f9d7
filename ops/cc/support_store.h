// The support store of meta-learned towers: the last rows of each task, shared
// by the threads and model versions of a process, and kept in files, or in a
// Redis that other processes share.

#ifndef QIANMO_OPS_CC_SUPPORT_STORE_H_
#define QIANMO_OPS_CC_SUPPORT_STORE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "ops/cc/support_row.h"

namespace qianmo {

struct SupportOptions {
  SupportShape shape;
  SupportLimits limits;
  // Of the folder, or the URL of a Redis; none: in memory only.
  std::string path;
  // Microseconds since 1970; none: the system's. It is asked when the store
  // opens, and `steady`, which never jumps, from then on: rows are dated and
  // expire right when the system's clock is set while the store is open.
  std::function<int64_t()> clock;
  // Microseconds since any time; none: `clock` if given, else the system's.
  std::function<int64_t()> steady;
};

struct SupportStats {
  int64_t tasks = 0;
  int64_t rows = 0;
  int64_t bytes = 0;
  int64_t hits = 0;           // tasks that a read found usable rows of
  int64_t misses = 0;         // tasks that it found none of
  int64_t refused = 0;        // rows that it left out, being of another version
  int64_t evicted = 0;        // tasks, by time or capacity
  int64_t damaged_bytes = 0;  // of the files, when they were opened
  int64_t write_errors = 0;   // of the files since then; rows, of a Redis
  int64_t read_errors = 0;    // tasks that a Redis did not let read
};
constexpr int64_t kNumSupportStats = sizeof(SupportStats) / sizeof(int64_t);

// Rows to put: of each array the part of row i.
struct SupportBatch {
  size_t num_rows;
  const int64_t* task;
  const float* h;        // [num_rows, dim]
  const float* labels;   // [num_rows, num_labels]
  const float* weights;  // as labels; where one is 0 the label is undefined
  const int64_t* time;
  const int64_t* event;
  const int64_t* version;
};

// Room for rows that are read: of each array the part of task i.
struct SupportRoom {
  int32_t max_rows;  // of a task
  float* h;          // [tasks, max_rows, dim]
  float* labels;     // [tasks, max_rows, num_labels]
  float* weights;    // as labels
  int64_t* time;     // [tasks, max_rows]
  int64_t* event;    // [tasks, max_rows]
  int32_t* count;    // rows found; behind them nothing is written
};

// Threads may share it.
class SupportStore {
 public:
  // Opens a store of one's own. Returns null and an error when the options,
  // the files or the Redis do not allow it.
  static std::unique_ptr<SupportStore> Open(const SupportOptions& options,
                                            std::string* error);
  // The store of that name in this process: it opens with the first holder and
  // closes with the last. All holders agree on shape and path; the limits are
  // those of the latest.
  static std::shared_ptr<SupportStore> Shared(const std::string& name,
                                              const SupportOptions& options,
                                              std::string* error);
  SupportStore(const SupportStore&) = delete;
  SupportStore& operator=(const SupportStore&) = delete;
  virtual ~SupportStore() = default;

  const SupportShape& shape() const { return options_.shape; }

  // Whether calls wait for another machine.
  virtual bool is_remote() const = 0;
  virtual void SetLimits(const SupportLimits& limits) = 0;
  // Stores rows, and sets a SupportStatus for each.
  virtual void Put(const SupportBatch& rows, int32_t* status) = 0;
  // Reads the last rows of tasks, the newest last; those of other versions are
  // left out.
  virtual void Get(const int64_t* tasks, size_t num_tasks, int64_t version,
                   const SupportRoom& room) = 0;
  // What it cannot tell is -1.
  virtual SupportStats Stats() = 0;
  // Lets what was put outlast this process.
  virtual void Flush() = 0;
  // Writes all rows to a file, which has its name when it is complete.
  virtual bool Export(const std::string& path, std::string* error) = 0;
  // Adds the rows of an exported file, with their times of writing.
  virtual bool Import(const std::string& path, std::string* error) = 0;

 protected:
  explicit SupportStore(const SupportOptions& options);

  const SupportOptions options_;  // with a clock that is steady
};

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_SUPPORT_STORE_H_
