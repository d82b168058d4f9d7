// The support store of meta-learned towers: the last rows of each task, shared
// by the threads and model versions of a process, and kept in files.
//
// A store's folder holds
//
//   LOCK        held by the process that has the store open
//   7.snapshot  all rows at some time after 7.log was begun
//   7.log       every change since
//
// Opening reads the last snapshot and the logs from its number on. A log that
// outgrows its snapshot is followed by the next one, and by its snapshot, which
// is written while readers and writers go on: a change that is in both is made
// twice, which does nothing.

#ifndef QIANMO_OPS_CC_SUPPORT_STORE_H_
#define QIANMO_OPS_CC_SUPPORT_STORE_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "ops/cc/support_log.h"
#include "ops/cc/support_table.h"

namespace qianmo {

struct SupportOptions {
  SupportShape shape;
  SupportLimits limits;
  std::string path;  // of the folder; none: in memory only
  std::function<int64_t()>
      clock;  // microseconds since 1970; none: the system's
};

struct SupportStats {
  int64_t tasks;
  int64_t rows;
  int64_t bytes;
  int64_t hits;
  int64_t misses;
  int64_t refused;
  int64_t evicted;
  int64_t damaged_bytes;  // of the files, when they were opened
  int64_t write_errors;   // of the files, since then
};

// Threads may share it.
class SupportStore {
 public:
  // Opens a store of one's own. Returns null and an error when the options or
  // the files do not allow it.
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
  ~SupportStore();

  const SupportShape& shape() const { return table_.shape(); }

  // Stores one row: h [dim], labels and weights [num_labels]. Where a weight is
  // 0 the label is undefined, and may be anything. Returns a SupportStatus.
  int32_t Put(int64_t task, const float* h, const float* labels,
              const float* weights, int64_t time, int64_t version);
  // Follows a series of Put(): writes the log if much of it waits.
  void AfterPut();
  // See SupportTable::Get().
  int32_t Get(int64_t task, int64_t version, int32_t max_rows, float* h,
              float* labels, float* weights, int64_t* time) {
    return table_.Get(task, version, max_rows, h, labels, weights, time);
  }
  SupportStats Stats();

  // Evicts what is past its time or over the capacity, without blocking others.
  // Runs each second by itself.
  void Evict();
  // Hands all changes to the system, so that they outlast this process. Runs
  // twice a second by itself.
  void Flush();
  // Begins a new log and writes its snapshot. Runs by itself.
  bool Compact(std::string* error);
  // Writes all rows to a file, which has its name when it is complete.
  bool Export(const std::string& path, std::string* error);
  // Adds the rows of an exported file, with their times of writing.
  bool Import(const std::string& path, std::string* error);

 private:
  explicit SupportStore(const SupportOptions& options);
  bool OpenFiles(std::string* error);
  bool ReadFiles(std::string* error);
  std::string FileOf(int64_t generation, const char* kind) const;
  bool WriteSnapshot(const std::string& path, uint64_t* bytes,
                     std::string* error);
  void Every(int64_t milliseconds, const std::function<void()>& work);
  void Keep();

  const SupportOptions options_;
  SupportTable table_;
  int lock_fd_ = -1;
  int64_t damaged_bytes_ = 0;
  std::atomic<int64_t> write_errors_{0};

  std::mutex log_mutex_;  // of log_ and the order of what is appended to it
  std::unique_ptr<LogFile> log_;  // none in memory only
  // The log lacks changes, or a snapshot of its own.
  std::atomic<bool> snapshot_due_{false};

  std::mutex compact_mutex_;  // of the next three
  int64_t generation_ = 0;
  uint64_t snapshot_bytes_ = 0;
  int64_t next_compaction_ = 0;  // not before, by clock

  std::mutex stop_mutex_;
  std::condition_variable stopped_;
  std::atomic<bool> stopping_{false};
  std::thread flusher_, keeper_;
};

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_SUPPORT_STORE_H_
