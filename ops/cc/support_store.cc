#include "ops/cc/support_store.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <system_error>
#include <utility>
#include <vector>

namespace qianmo {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kFlushMillis = 500, kKeepMillis = 1000;
constexpr int64_t kMaxUnflushed = int64_t{64} << 20;  // bytes in journals
constexpr uint64_t kMinLog = uint64_t{64} << 20;      // before a compaction
constexpr int64_t kRetryMicros = 60'000'000;          // a failed compaction
constexpr int kEvictedAtOnce = 128;                   // tasks between rests
constexpr size_t kWrittenAtOnce = size_t{1} << 20;    // bytes of a snapshot
constexpr size_t kSyncedAtOnce = size_t{64} << 20;
// Tasks that a writer evicts for each row; one is enough but for a capacity in
// bytes that was just lowered, and then the rest follows in the background.
constexpr int kEvictedPerRow = 4;

int64_t SystemMicros() {
  return std::chrono::duration_cast<std::chrono::microseconds>(
             std::chrono::system_clock::now().time_since_epoch())
      .count();
}

bool AllFinite(const float* values, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    if (!std::isfinite(values[i])) return false;
  }
  return true;
}

bool SyncFolder(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return false;
  const bool synced = fsync(fd) == 0;
  close(fd);
  return synced;
}

// A thread that rests has its next turn soon and whole. One that works on is
// interrupted in the end, and if it then holds a lock, all wait for it.
void Rest() { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }

SupportOptions WithClock(SupportOptions options) {
  if (!options.clock) options.clock = SystemMicros;
  return options;
}

bool Valid(const SupportOptions& options, std::string* error) {
  const SupportShape& shape = options.shape;
  const SupportLimits& limits = options.limits;
  const auto in = [error](const char* name, int64_t value, int64_t low,
                          int64_t high) {
    if (low <= value && value <= high) return true;
    *error = std::string("`") + name + "` should be in [" +
             std::to_string(low) + ", " + std::to_string(high) +
             "]. Received: " + std::to_string(value);
    return false;
  };
  constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
  return in("dim", shape.dim, 1, 65536) &&
         in("num_labels", shape.num_labels, 1, 65536) &&
         in("max_rows", shape.max_rows, 1, 4096) &&
         in("ttl", limits.ttl_micros, 0, kAny) &&
         in("max_tasks", limits.max_tasks, 0, kAny) &&
         in("max_bytes", limits.max_bytes, 0, kAny);
}

// The stores that are shared by name. It is never destroyed, as stores may be
// used until the process ends.
struct Registry {
  std::mutex mutex;
  std::condition_variable closed;
  std::map<std::string, std::weak_ptr<SupportStore>>
      stores;  // closing ones too

  static Registry& Get() {
    static Registry* const registry = new Registry;
    return *registry;
  }
};

// Those that are open when the process ends keep what was put last.
void FlushAll() {
  std::vector<std::shared_ptr<SupportStore>> stores;
  {
    Registry& registry = Registry::Get();
    std::lock_guard<std::mutex> lock(registry.mutex);
    for (const auto& entry : registry.stores) {
      stores.push_back(entry.second.lock());
    }
  }
  for (const auto& store : stores) {
    if (store) store->Flush();
  }
}

}  // namespace

std::unique_ptr<SupportStore> SupportStore::Open(const SupportOptions& options,
                                                 std::string* error) {
  if (!Valid(options, error)) return nullptr;
  std::unique_ptr<SupportStore> store(new SupportStore(WithClock(options)));
  if (!options.path.empty() && !store->OpenFiles(error)) return nullptr;
  SupportStore* const opened = store.get();
  if (opened->log_) {
    opened->flusher_ = std::thread([opened] {
      opened->Every(kFlushMillis, [opened] { opened->Flush(); });
    });
  }
  opened->keeper_ = std::thread(
      [opened] { opened->Every(kKeepMillis, [opened] { opened->Keep(); }); });
  return store;
}

std::shared_ptr<SupportStore> SupportStore::Shared(
    const std::string& name, const SupportOptions& options,
    std::string* error) {
  static const int at_exit = std::atexit(FlushAll);
  (void)at_exit;
  if (!Valid(options, error)) return nullptr;
  Registry& registry = Registry::Get();
  std::shared_ptr<SupportStore> store;  // outlives the lock: see below
  std::unique_lock<std::mutex> lock(registry.mutex);
  // A store that is being closed still has its files.
  registry.closed.wait(lock, [&] {
    const auto found = registry.stores.find(name);
    return found == registry.stores.end() || (store = found->second.lock());
  });
  if (store) {
    const SupportShape &have = store->shape(), &want = options.shape;
    if (have.dim != want.dim || have.num_labels != want.num_labels ||
        have.max_rows != want.max_rows ||
        store->options_.path != options.path) {
      const auto shown = [](const SupportShape& shape,
                            const std::string& path) {
        return "dim " + std::to_string(shape.dim) + ", num_labels " +
               std::to_string(shape.num_labels) + ", max_rows " +
               std::to_string(shape.max_rows) + ", path `" + path + "`";
      };
      *error = "Store `" + name + "` is open with " +
               shown(have, store->options_.path) +
               ". Asked for: " + shown(want, options.path) +
               ". Use another name";
      return nullptr;
    }
    store->table_.SetLimits(options.limits);
    return store;
  }
  std::unique_ptr<SupportStore> opened = Open(options, error);
  if (!opened) return nullptr;
  // The last holder closes the store, and only then lets the name go.
  store.reset(opened.release(), [name](SupportStore* last) {
    delete last;
    Registry& registry = Registry::Get();
    std::lock_guard<std::mutex> lock(registry.mutex);
    registry.stores.erase(name);
    registry.closed.notify_all();
  });
  registry.stores[name] = store;
  return store;
}

SupportStore::SupportStore(const SupportOptions& options)
    : options_(options), table_(options.shape, options.clock) {
  table_.SetLimits(options.limits);
}

SupportStore::~SupportStore() {
  {
    std::lock_guard<std::mutex> lock(stop_mutex_);
    stopping_ = true;
  }
  stopped_.notify_all();
  if (flusher_.joinable()) flusher_.join();
  if (keeper_.joinable()) keeper_.join();
  Flush();
  if (lock_fd_ >= 0) close(lock_fd_);
}

void SupportStore::Every(int64_t milliseconds,
                         const std::function<void()>& work) {
  std::unique_lock<std::mutex> lock(stop_mutex_);
  while (!stopped_.wait_for(lock, std::chrono::milliseconds(milliseconds),
                            [this] { return stopping_.load(); })) {
    lock.unlock();
    work();
    lock.lock();
  }
}

std::string SupportStore::FileOf(int64_t generation, const char* kind) const {
  return options_.path + "/" + std::to_string(generation) + kind;
}

bool SupportStore::OpenFiles(std::string* error) {
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
bool SupportStore::ReadFiles(std::string* error) {
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

  const auto put = [this](int64_t task, const char* row) {
    table_.Load(task, row);
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
  return log_ != nullptr && SyncFolder(options_.path);
}

int32_t SupportStore::Put(int64_t task, const float* h, const float* labels,
                          const float* weights, int64_t time, int64_t version) {
  const size_t dim = shape().dim, num_labels = shape().num_labels;
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

  thread_local std::vector<char> row;
  row.assign(shape().row_bytes(), 0);
  const RowHead head = {time, version, 0};
  std::memcpy(row.data(), &head, sizeof(head));
  char* floats = row.data() + sizeof(head);
  std::memcpy(floats, h, dim * sizeof(float));
  floats += dim * sizeof(float);
  for (size_t i = 0; i < num_labels; ++i) {
    const float label = weights[i] == 0 ? 0 : labels[i];
    std::memcpy(floats + i * sizeof(float), &label, sizeof(float));
  }
  floats += num_labels * sizeof(float);
  std::memcpy(floats, weights, num_labels * sizeof(float));
  status = table_.Put(task, row.data());
  for (int i = 0; i < kEvictedPerRow && table_.EvictOldest(); ++i) {
  }
  return status;
}

void SupportStore::AfterPut() {
  if (table_.journal_bytes() > kMaxUnflushed) Flush();
}

SupportStats SupportStore::Stats() {
  const SupportCounters counters = table_.Counters();
  return {table_.num_tasks(), counters.rows,   table_.bytes(),
          counters.hits,      counters.misses, counters.refused,
          counters.evicted,   damaged_bytes_,  write_errors_};
}

void SupportStore::Evict() {
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

void SupportStore::Flush() {
  if (options_.path.empty()) return;
  std::lock_guard<std::mutex> lock(log_mutex_);
  table_.DrainJournals([this](const std::vector<char>& journal) {
    if (log_->Append(journal)) return;
    // The rows are in memory still: a new snapshot will hold them.
    snapshot_due_ = true;
    ++write_errors_;
  });
}

void SupportStore::Keep() {
  Evict();
  if (options_.path.empty()) return;
  bool due;
  {
    std::lock_guard<std::mutex> lock(compact_mutex_);
    if (!log_->Sync()) ++write_errors_;
    due = options_.clock() >= next_compaction_ &&
          (snapshot_due_ || log_->bytes() > std::max(kMinLog, snapshot_bytes_));
  }
  std::string error;  // counted
  if (due) Compact(&error);
}

bool SupportStore::Compact(std::string* error) {
  if (options_.path.empty()) return true;
  std::lock_guard<std::mutex> compacting(compact_mutex_);
  const int64_t next = generation_ + 1;
  next_compaction_ = options_.clock() + kRetryMicros;
  auto log = LogFile::Open(FileOf(next, ".log"), shape(), 0, error);
  if (!log || !SyncFolder(options_.path)) {
    ++write_errors_;
    return false;
  }
  Flush();
  snapshot_due_ = false;
  {
    std::lock_guard<std::mutex> lock(log_mutex_);
    log_.swap(log);
  }
  const int64_t before = generation_;
  generation_ = next;
  if (!WriteSnapshot(FileOf(next, ".snapshot"), &snapshot_bytes_, error)) {
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

bool SupportStore::WriteSnapshot(const std::string& path, uint64_t* bytes,
                                 std::string* error) {
  const std::string writing = path + ".writing";
  auto file = LogFile::Open(writing, shape(), 0, error);
  if (!file) return false;
  bool good = true;
  uint64_t synced = 0;
  std::vector<char> records;
  constexpr size_t kTasks = SupportTable::kTasksAtOnce;
  for (size_t shard = 0; good && shard < SupportTable::kShards; ++shard) {
    const std::vector<int64_t> tasks = table_.Tasks(shard);
    for (size_t i = 0; good && i < tasks.size(); i += kTasks) {
      if (stopping_) return false;  // logs alone will do
      const size_t n = std::min(kTasks, tasks.size() - i);
      table_.Copy(shard, tasks.data() + i, n, &records);
      if (records.size() < kWrittenAtOnce) continue;
      good = file->Append(records);
      records.clear();
      Rest();
      if (good && file->bytes() - synced > kSyncedAtOnce) {
        good = file->Sync();
        synced = file->bytes();
      }
    }
  }
  good = good && file->Append(records) && file->Sync() &&
         rename(writing.c_str(), path.c_str()) == 0;
  const std::string folder = fs::path(path).parent_path();
  if (!good || !SyncFolder(folder.empty() ? "." : folder)) {
    *error = FileError("Cannot write", path);
    unlink(writing.c_str());
    return false;
  }
  *bytes = file->bytes();
  return true;
}

bool SupportStore::Export(const std::string& path, std::string* error) {
  uint64_t bytes;
  return WriteSnapshot(path, &bytes, error);
}

bool SupportStore::Import(const std::string& path, std::string* error) {
  LogContent content;
  const auto put = [this](int64_t task, const char* row) {
    table_.Load(task, row);
    table_.EvictOldest();
    AfterPut();
  };
  if (!ReadLog(path, shape(), put, [](int64_t) {}, &content, error)) {
    return false;
  }
  if (content.damaged > 0 || !content.header_ok) {
    *error = "`" + path + "` should be an exported support store, and " +
             std::to_string(content.damaged) +
             " bytes of it are not; the rows in the others were added";
    return false;
  }
  return true;
}

}  // namespace qianmo
