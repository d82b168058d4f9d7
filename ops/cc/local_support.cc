#include "ops/cc/local_support.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

namespace qianmo {
namespace {

namespace fs = std::filesystem;

constexpr std::chrono::milliseconds kFlush{500}, kKeep{1000};
constexpr int64_t kMaxUnflushed = int64_t{64} << 20;  // bytes in journals
constexpr uint64_t kMinLog = uint64_t{64} << 20;      // before a compaction
constexpr int64_t kRetryMicros = 60'000'000;          // a failed compaction
constexpr int kEvictedAtOnce = 128;                   // tasks between rests
constexpr size_t kWrittenAtOnce = size_t{1} << 20;    // bytes of a snapshot
constexpr size_t kSyncedAtOnce = size_t{64} << 20;
// Tasks that a writer evicts for each row; one is enough but for a capacity in
// bytes that was just lowered, and then the rest follows in the background.
constexpr int kEvictedPerRow = 4;

// A thread that rests has its next turn soon and whole. One that works on is
// interrupted in the end, and if it then holds a lock, all wait for it.
void Rest() { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }

}  // namespace

std::unique_ptr<LocalSupport> LocalSupport::Open(const SupportOptions& options,
                                                 std::string* error) {
  std::unique_ptr<LocalSupport> store(new LocalSupport(options));
  if (!options.path.empty() && !store->OpenFiles(error)) return nullptr;
  LocalSupport* const opened = store.get();
  if (opened->log_) {
    opened->flusher_ =
        std::make_unique<Repeated>(kFlush, [opened] { opened->Flush(); });
  }
  opened->keeper_ =
      std::make_unique<Repeated>(kKeep, [opened] { opened->Keep(); });
  return store;
}

LocalSupport::LocalSupport(const SupportOptions& options)
    : SupportStore(options), table_(options_.shape, options_.clock) {
  table_.SetLimits(options.limits);
}

LocalSupport::~LocalSupport() {
  stopping_ = true;
  flusher_.reset();
  keeper_.reset();
  LocalSupport::Flush();
  if (lock_fd_ >= 0) close(lock_fd_);
}

std::string LocalSupport::FileOf(int64_t generation, const char* kind) const {
  return options_.path + "/" + std::to_string(generation) + kind;
}

bool LocalSupport::OpenFiles(std::string* error) {
  std::error_code failed;
  fs::create_directories(options_.path, failed);
  const std::string lock = options_.path + "/LOCK";
  lock_fd_ = open(lock.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (lock_fd_ < 0) {
    *error = FileError("Cannot write", lock);
    return false;
  }
  if (flock(lock_fd_, LOCK_EX | LOCK_NB) != 0) {
    *error = "Another process, or a store of another name, has `" +
             options_.path + "` open";
    return false;
  }
  if (!ReadFiles(error)) return false;
  while (table_.EvictOldest()) {
  }
  table_.StartJournal();
  return true;
}

// Reads the files, deletes those that are no longer needed, and leaves log_
// open.
bool LocalSupport::ReadFiles(std::string* error) {
  std::vector<int64_t> snapshots, logs;
  std::vector<fs::path> files;
  std::error_code failed;
  for (const auto& entry : fs::directory_iterator(options_.path, failed)) {
    const fs::path& path = entry.path();
    const std::string kind = path.extension(), stem = path.stem();
    const bool numbered = !stem.empty() && stem.size() < 19 &&
                          stem.find_first_not_of("0123456789") == stem.npos;
    if (numbered && kind == ".snapshot") snapshots.push_back(std::stoll(stem));
    if (numbered && kind == ".log") logs.push_back(std::stoll(stem));
    if (kind == ".writing") files.push_back(path);
  }
  if (failed) {
    *error = "Cannot list `" + options_.path + "`: " + failed.message();
    return false;
  }
  std::sort(snapshots.begin(), snapshots.end());
  std::sort(logs.begin(), logs.end());

  // Of rows from the future nobody knows how old they are: the clock is behind,
  // or was ahead when they were written.
  const int64_t until = options_.limits.ttl_micros > 0
                            ? options_.clock()
                            : std::numeric_limits<int64_t>::max();
  const auto put = [this, until](int64_t task, const char* row) {
    RowHead head;
    std::memcpy(&head, row, sizeof(head));
    if (head.written <= until) table_.Load(task, row);
  };
  const auto drop = [this](int64_t task) { table_.Drop(task); };
  LogContent content;
  uint64_t keep = 0;
  if (!snapshots.empty()) {
    generation_ = snapshots.back();
    const std::string path = FileOf(generation_, ".snapshot");
    if (!ReadLog(path, shape(), put, drop, &content, error)) return false;
    damaged_bytes_ += content.damaged;
    snapshot_bytes_ = content.end;
  }
  for (const int64_t log : logs) {
    if (!snapshots.empty() && log < snapshots.back()) {
      files.push_back(FileOf(log, ".log"));
      continue;
    }
    if (!ReadLog(FileOf(log, ".log"), shape(), put, drop, &content, error)) {
      return false;
    }
    damaged_bytes_ += content.damaged;
    generation_ = log;
    keep = content.end;
  }
  for (const int64_t snapshot : snapshots) {
    if (snapshot < snapshots.back()) {
      files.push_back(FileOf(snapshot, ".snapshot"));
    }
  }
  for (const fs::path& path : files) fs::remove(path, failed);
  log_ = LogFile::Open(FileOf(generation_, ".log"), shape(), keep, error);
  return log_ != nullptr && SyncFolder(options_.path, error);
}

void LocalSupport::Put(const SupportBatch& rows, int32_t* status) {
  const size_t dim = shape().dim, num_labels = shape().num_labels;
  std::vector<char> row(shape().row_bytes());
  for (size_t i = 0; i < rows.num_rows; ++i) {
    status[i] = PackRow(shape(), rows.h + i * dim, rows.labels + i * num_labels,
                        rows.weights + i * num_labels, rows.time[i],
                        rows.event[i], rows.version[i], row.data());
    if (status[i] != kStored) continue;
    status[i] = table_.Put(rows.task[i], row.data());
    for (int j = 0; j < kEvictedPerRow && table_.EvictOldest(); ++j) {
    }
  }
  FlushIfMuch();
}

void LocalSupport::Get(const int64_t* tasks, size_t num_tasks, int64_t version,
                       const SupportRoom& room) {
  const size_t dim = shape().dim, num_labels = shape().num_labels;
  for (size_t i = 0; i < num_tasks; ++i) {
    const size_t first = i * room.max_rows;
    room.count[i] = table_.Get(
        tasks[i], version, room.max_rows, room.h + first * dim,
        room.labels + first * num_labels, room.weights + first * num_labels,
        room.time + first, room.event + first);
  }
}

void LocalSupport::FlushIfMuch() {
  if (table_.journal_bytes() > kMaxUnflushed) Flush();
}

SupportStats LocalSupport::Stats() {
  const SupportCounters counters = table_.Counters();
  SupportStats stats;
  stats.tasks = table_.num_tasks();
  stats.rows = counters.rows;
  stats.bytes = table_.bytes();
  stats.hits = counters.hits;
  stats.misses = counters.misses;
  stats.refused = counters.refused;
  stats.evicted = counters.evicted;
  stats.damaged_bytes = damaged_bytes_;
  stats.write_errors = write_errors_;
  return stats;
}

void LocalSupport::Evict() {
  int evicted = 0;
  const auto go_on = [&](int more) {
    evicted += more;
    if (evicted >= kEvictedAtOnce) {
      evicted = 0;
      Rest();
    }
    return !stopping_;
  };
  while (table_.EvictOldest() && go_on(1)) {
  }
  // In turns, so that nobody waits long for one shard.
  for (bool more = true; more;) {
    more = false;
    for (size_t shard = 0; shard < SupportTable::kShards; ++shard) {
      const int found = table_.ExpireSome(shard);
      if (!go_on(found)) return;
      more |= found == SupportTable::kTasksAtOnce;
    }
  }
}

void LocalSupport::Flush() {
  if (options_.path.empty()) return;
  std::lock_guard<std::mutex> lock(log_mutex_);
  table_.DrainJournals([this](const std::vector<char>& journal) {
    if (log_->Append(journal)) return;
    // The rows are in memory still: a new snapshot will hold them.
    snapshot_due_ = true;
    ++write_errors_;
  });
}

void LocalSupport::SyncLog() {
  if (!log_->Sync()) ++write_errors_;
}

void LocalSupport::Keep() {
  Evict();
  if (options_.path.empty()) return;
  bool due;
  {
    std::lock_guard<std::mutex> lock(compact_mutex_);
    SyncLog();
    due = options_.clock() >= next_compaction_ &&
          (snapshot_due_ || log_->bytes() > std::max(kMinLog, snapshot_bytes_));
  }
  std::string error;  // counted
  if (due) Compact(&error);
}

bool LocalSupport::Compact(std::string* error) {
  if (options_.path.empty()) return true;
  std::lock_guard<std::mutex> compacting(compact_mutex_);
  const int64_t next = generation_ + 1;
  next_compaction_ = options_.clock() + kRetryMicros;
  auto log = LogFile::Open(FileOf(next, ".log"), shape(), 0, error);
  if (!log || !SyncFolder(options_.path, error)) {
    ++write_errors_;
    return false;
  }
  Flush();
  snapshot_due_ = false;
  {
    std::lock_guard<std::mutex> lock(log_mutex_);
    log_.swap(log);
  }
  if (!log->Sync()) ++write_errors_;  // the snapshot is yet to come
  const int64_t before = generation_;
  generation_ = next;
  if (!WriteSnapshot(FileOf(next, ".snapshot"), /*sync_log=*/true,
                     &snapshot_bytes_, error)) {
    ++write_errors_;
    snapshot_due_ = true;
    return false;
  }
  std::error_code failed;
  for (int64_t old = before; old >= 0; --old) {
    const bool log_gone = !fs::remove(FileOf(old, ".log"), failed);
    const bool snapshot_gone = !fs::remove(FileOf(old, ".snapshot"), failed);
    if (log_gone && snapshot_gone) break;
  }
  next_compaction_ = 0;
  return true;
}

bool LocalSupport::WriteSnapshot(const std::string& path, bool sync_log,
                                 uint64_t* bytes, std::string* error) {
  using Clock = std::chrono::steady_clock;
  const auto fill = [this, sync_log](LogFile* file, std::string*) {
    uint64_t synced = 0;
    auto log_synced = Clock::now();
    std::vector<char> records;
    constexpr size_t kTasks = SupportTable::kTasksAtOnce;
    for (size_t shard = 0; shard < SupportTable::kShards; ++shard) {
      const std::vector<int64_t> tasks = table_.Tasks(shard);
      for (size_t i = 0; i < tasks.size(); i += kTasks) {
        if (stopping_) return false;  // logs alone will do
        const size_t n = std::min(kTasks, tasks.size() - i);
        table_.Copy(shard, tasks.data() + i, n, &records);
        if (records.size() < kWrittenAtOnce) continue;
        if (!file->Append(records)) return false;
        records.clear();
        Rest();
        if (file->bytes() - synced > kSyncedAtOnce) {
          if (!file->Sync()) return false;
          synced = file->bytes();
        }
        if (sync_log && Clock::now() - log_synced >= kKeep) {
          SyncLog();
          log_synced = Clock::now();
        }
      }
    }
    return file->Append(records);
  };
  return WriteWhole(path, shape(), fill, bytes, error);
}

bool LocalSupport::Export(const std::string& path, std::string* error) {
  uint64_t bytes;
  return WriteSnapshot(path, /*sync_log=*/false, &bytes, error);
}

bool LocalSupport::Import(const std::string& path, std::string* error) {
  LogContent content;
  const auto put = [this](int64_t task, const char* row) {
    table_.Load(task, row);
    table_.EvictOldest();
    FlushIfMuch();
  };
  return ReadLog(
             path, shape(), put, [](int64_t) {}, &content, error) &&
         content.IsWhole(path, error);
}

}  // namespace qianmo
