// The rows of the support store in memory.

#ifndef QIANMO_OPS_CC_SUPPORT_TABLE_H_
#define QIANMO_OPS_CC_SUPPORT_TABLE_H_

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "ops/cc/support_blocks.h"
#include "ops/cc/support_log.h"

namespace qianmo {

struct SupportCounters {
  int64_t rows = 0;     // now
  int64_t hits = 0;     // tasks that a read found usable rows of
  int64_t misses = 0;   // tasks that it found none of
  int64_t refused = 0;  // rows that it left out, being of another version
  int64_t evicted = 0;  // tasks, by time or capacity
};

// Tasks and their last rows. Threads may share it.
//
// Tasks are spread over shards, each with a lock, an index by id and one by
// time of writing, and for each size of task (1, 2, 3, 4, 6, 8, 12 ... max_rows
// rows) a pool of blocks. No lock is held for longer than it takes to copy a
// few tasks. Changes are also appended to the shard's journal, if it is kept; a
// journal has the order in which its shard changed.
class SupportTable {
 public:
  static constexpr size_t kShards = 128;
  static constexpr int kTasksAtOnce = 16;

  // `clock` tells the microseconds since 1970.
  SupportTable(const SupportShape& shape, std::function<int64_t()> clock);
  SupportTable(const SupportTable&) = delete;
  SupportTable& operator=(const SupportTable&) = delete;

  const SupportShape& shape() const { return shape_; }
  void SetLimits(const SupportLimits& limits);

  // Stores a row, whose time of writing is set here. It replaces one of the
  // same task, event time and event id; a full task gives up its row of the
  // earliest event.
  int32_t Put(int64_t task, char* row);
  // The same with the time of writing that the row has.
  void Load(int64_t task, const char* row);
  void Drop(int64_t task);

  // Copies the last rows of `version`, the newest last, at most `max_rows`.
  // Returns their number.
  int32_t Get(int64_t task, int64_t version, int32_t max_rows, float* h,
              float* labels, float* weights, int64_t* time, int64_t* event);

  // Evicts the task that was not written for longest, if the table is over its
  // capacity. Returns whether it was.
  bool EvictOldest();
  // Evicts some tasks of a shard whose rows are all past their time, at most
  // kTasksAtOnce. Returns their number.
  int ExpireSome(size_t shard);

  void StartJournal() { journaling_ = true; }
  int64_t journal_bytes() const { return journal_bytes_; }
  // Hands over the journals and begins new ones.
  void DrainJournals(const std::function<void(const std::vector<char>&)>& take);

  // For a copy of the whole table: the tasks of a shard in the order of their
  // last writes, and the rows of some of them, as records.
  std::vector<int64_t> Tasks(size_t shard);
  void Copy(size_t shard, const int64_t* tasks, size_t n,
            std::vector<char>* records);

  int64_t num_tasks() const { return num_tasks_; }
  // Of rows and index.
  int64_t bytes() const { return block_bytes_ + num_tasks_ * kTaskBytes; }
  SupportCounters Counters();

 private:
  static constexpr int64_t kTaskBytes = 128;  // of a task in both indices
  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  static constexpr uint8_t kNoBlock = 255;

  // The last time of writing, and the task.
  using Ages = std::set<std::pair<int64_t, int64_t>>;

  struct Task {
    Ages::iterator age;
    uint32_t block = 0;
    uint16_t num_rows = 0;
    uint8_t size = kNoBlock;  // place in sizes_
  };

  struct alignas(64) Shard {
    std::mutex mutex;
    std::unordered_map<int64_t, Task> tasks;
    Ages ages;
    std::vector<BlockPool> pools;  // for each of sizes_
    std::vector<char> journal;
    SupportCounters counters;
    std::atomic<int64_t> oldest{kNever};  // when the oldest task was written
  };

  // Pages that are given back after the lock: declare it before the guard.
  using Garbage = std::vector<PageStock::Page>;

  static size_t ShardOf(int64_t task);
  char* RowsOf(const Shard& shard, const Task& task) const;
  int64_t Written();  // later than every one before
  int64_t ExpiredUntil() const;
  bool OverCapacity() const;
  int32_t Apply(int64_t task, char* row, bool stamp);
  bool Fit(Shard* shard, Task* task, int32_t num_rows, Garbage* garbage);
  void Release(Shard* shard, const Task& task, Garbage* garbage);
  void RemoveExpiredRows(Shard* shard, Task* task);
  void Erase(Shard* shard, int64_t id, Garbage* garbage);
  void EvictOldestOf(Shard* shard, Garbage* garbage);
  template <typename Append>
  void Journal(Shard* shard, Append append);

  const SupportShape shape_;
  const size_t row_bytes_;
  const std::function<int64_t()> clock_;
  std::vector<int32_t> sizes_;     // rows in a block of each pool
  std::vector<uint8_t> size_for_;  // number of rows -> place in sizes_
  bool journaling_ = false;
  std::atomic<int64_t> ttl_micros_{0}, max_tasks_{0}, max_bytes_{0};
  std::atomic<int64_t> last_written_{0};
  std::atomic<int64_t> num_tasks_{0}, block_bytes_{0}, journal_bytes_{0};
  std::mutex evicting_;  // one thread at a time, so that none evicts too much
  PageStock stock_;
  std::array<Shard, kShards> shards_;
};

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_SUPPORT_TABLE_H_
