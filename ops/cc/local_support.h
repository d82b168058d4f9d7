// The support store in memory and in files.
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

#ifndef QIANMO_OPS_CC_LOCAL_SUPPORT_H_
#define QIANMO_OPS_CC_LOCAL_SUPPORT_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "ops/cc/repeated.h"
#include "ops/cc/support_log.h"
#include "ops/cc/support_store.h"
#include "ops/cc/support_table.h"

namespace qianmo {

class LocalSupport : public SupportStore {
 public:
  static std::unique_ptr<LocalSupport> Open(const SupportOptions& options,
                                            std::string* error);
  ~LocalSupport() override;

  bool is_remote() const override { return false; }
  void SetLimits(const SupportLimits& limits) override {
    table_.SetLimits(limits);
  }
  void Put(const SupportBatch& rows, int32_t* status) override;
  void Get(const int64_t* tasks, size_t num_tasks, int64_t version,
           const SupportRoom& room) override;
  SupportStats Stats() override;
  // Runs twice a second by itself.
  void Flush() override;
  bool Export(const std::string& path, std::string* error) override;
  bool Import(const std::string& path, std::string* error) override;

  // Evicts what is past its time or over the capacity, without blocking others.
  // Runs each second by itself.
  void Evict();
  // Begins a new log and writes its snapshot. Runs by itself.
  bool Compact(std::string* error);

 private:
  explicit LocalSupport(const SupportOptions& options);
  bool OpenFiles(std::string* error);
  bool ReadFiles(std::string* error);
  // Writes the log if much of what was put waits.
  void FlushIfMuch();
  std::string FileOf(int64_t generation, const char* kind) const;
  // Writes all rows; if asked, syncs the log each second meanwhile.
  bool WriteSnapshot(const std::string& path, bool sync_log, uint64_t* bytes,
                     std::string* error);
  // Needs compact_mutex_, as the log may not be swapped.
  void SyncLog();
  void Keep();

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

  std::atomic<bool> stopping_{false};
  std::unique_ptr<Repeated> flusher_, keeper_;
};

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_LOCAL_SUPPORT_H_
