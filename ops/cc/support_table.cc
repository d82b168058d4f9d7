#include "ops/cc/support_table.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace qianmo {
namespace {

// A block: the address of the task that owns it, then its rows.
constexpr size_t kOwnerBytes = sizeof(void*);

RowHead* HeadOf(char* row) { return reinterpret_cast<RowHead*>(row); }

}  // namespace

SupportTable::SupportTable(const SupportShape& shape,
                           std::function<int64_t()> clock)
    : shape_(shape),
      row_bytes_(shape.row_bytes()),
      clock_(std::move(clock)),
      size_for_(shape.max_rows + 1) {
  for (int32_t rows = 1; rows < shape.max_rows; rows *= 2) {
    sizes_.push_back(rows);
    if (rows > 1 && rows / 2 * 3 < shape.max_rows) {
      sizes_.push_back(rows / 2 * 3);
    }
  }
  sizes_.push_back(shape.max_rows);
  for (int32_t rows = 1; rows <= shape.max_rows; ++rows) {
    size_for_[rows] = static_cast<uint8_t>(
        std::lower_bound(sizes_.begin(), sizes_.end(), rows) - sizes_.begin());
  }
  for (Shard& shard : shards_) {
    for (const int32_t rows : sizes_) {
      shard.pools.emplace_back(kOwnerBytes + rows * row_bytes_, &stock_);
    }
  }
}

void SupportTable::SetLimits(const SupportLimits& limits) {
  ttl_micros_ = limits.ttl_micros;
  max_tasks_ = limits.max_tasks;
  max_bytes_ = limits.max_bytes;
}

size_t SupportTable::ShardOf(int64_t task) {
  // Fibonacci hashing: the high bits of the product depend on all bits.
  static_assert(kShards == 128, "the shift takes 7 bits");
  return (static_cast<uint64_t>(task) * 0x9E3779B97F4A7C15u) >> 57;
}

char* SupportTable::RowsOf(const Shard& shard, const Task& task) const {
  return shard.pools[task.size].At(task.block) + kOwnerBytes;
}

int64_t SupportTable::Written() {
  const int64_t now = clock_();
  int64_t last = last_written_;
  while (!last_written_.compare_exchange_weak(last, std::max(now, last + 1))) {
  }
  return std::max(now, last + 1);
}

int64_t SupportTable::ExpiredUntil() const {
  const int64_t ttl = ttl_micros_;
  return ttl > 0 ? clock_() - ttl : std::numeric_limits<int64_t>::min();
}

bool SupportTable::OverCapacity() const {
  const int64_t max_tasks = max_tasks_, max_bytes = max_bytes_;
  return (max_tasks > 0 && num_tasks_ > max_tasks) ||
         (max_bytes > 0 && bytes() > max_bytes);
}

template <typename Append>
void SupportTable::Journal(Shard* shard, Append append) {
  if (!journaling_) return;
  const size_t before = shard->journal.size();
  append(&shard->journal);
  journal_bytes_ += shard->journal.size() - before;
}

int32_t SupportTable::Put(int64_t task, char* row) {
  return Apply(task, row, /*stamp=*/true);
}

void SupportTable::Load(int64_t task, const char* row) {
  std::vector<char> copy(row, row + row_bytes_);  // aligned
  // A clock that was ahead must not keep rows for longer.
  int64_t& written = HeadOf(copy.data())->written;
  written = std::min(written, clock_());
  if (written <= ExpiredUntil()) return;
  int64_t last = last_written_;
  while (last < written &&
         !last_written_.compare_exchange_weak(last, written)) {
  }
  Apply(task, copy.data(), /*stamp=*/false);
}

int32_t SupportTable::Apply(int64_t id, char* row, bool stamp) {
  Shard& shard = shards_[ShardOf(id)];
  Garbage garbage;
  std::lock_guard<std::mutex> lock(shard.mutex);
  RowHead* const head = HeadOf(row);
  if (stamp) head->written = Written();
  const auto [found, is_new] = shard.tasks.try_emplace(id);
  Task* const task = &found->second;
  if (!is_new) RemoveExpiredRows(&shard, task);

  // Rows stand in the order of their events; `at` is the first later one.
  char* rows = task->num_rows > 0 ? RowsOf(shard, *task) : nullptr;
  int32_t at = task->num_rows;
  while (at > 0 && Later(*HeadOf(rows + (at - 1) * row_bytes_), *head)) {
    --at;
  }
  if (at > 0 && !Later(*head, *HeadOf(rows + (at - 1) * row_bytes_))) {
    --at;
  } else if (task->num_rows == shape_.max_rows) {
    if (at == 0) return kTooOld;
    --at;
    std::memmove(rows, rows + row_bytes_, at * row_bytes_);
  } else {
    if (!Fit(&shard, task, task->num_rows + 1, &garbage)) {
      if (is_new) shard.tasks.erase(found);
      return kNoMemory;
    }
    rows = RowsOf(shard, *task);
    std::memmove(rows + (at + 1) * row_bytes_, rows + at * row_bytes_,
                 (task->num_rows - at) * row_bytes_);
    ++task->num_rows;
    ++shard.counters.rows;
  }
  std::memcpy(rows + at * row_bytes_, row, row_bytes_);

  if (is_new) {
    ++num_tasks_;
    task->age = shard.ages.emplace_hint(shard.ages.end(), head->written, id);
    shard.oldest = shard.ages.begin()->first;
  } else if (head->written > task->age->first) {
    auto age = shard.ages.extract(task->age);
    age.value().first = head->written;
    task->age = shard.ages.insert(shard.ages.end(), std::move(age));
    shard.oldest = shard.ages.begin()->first;
  }
  Journal(&shard,
          [&](std::vector<char>* out) { AppendPut(id, row, row_bytes_, out); });
  return kStored;
}

// Moves a task to a block for `num_rows` rows. Returns false, and changes
// nothing, when there is no memory for it.
bool SupportTable::Fit(Shard* shard, Task* task, int32_t num_rows,
                       Garbage* garbage) {
  const uint8_t size = size_for_[num_rows];
  if (size == task->size) return true;
  BlockPool& pool = shard->pools[size];
  if (!pool.Add()) return false;
  const uint32_t block = pool.size() - 1;
  char* const to = pool.At(block);
  std::memcpy(to, &task, kOwnerBytes);
  if (task->size != kNoBlock) {
    std::memcpy(to + kOwnerBytes, RowsOf(*shard, *task),
                task->num_rows * row_bytes_);
    Release(shard, *task, garbage);
  }
  task->size = size;
  task->block = block;
  block_bytes_ += pool.block_bytes();
  return true;
}

// Gives up the block of a task.
void SupportTable::Release(Shard* shard, const Task& task, Garbage* garbage) {
  BlockPool& pool = shard->pools[task.size];
  const uint32_t last = pool.size() - 1;
  if (task.block != last) {
    char* const to = pool.At(task.block);
    std::memcpy(to, pool.At(last), pool.block_bytes());
    Task* owner;
    std::memcpy(&owner, to, kOwnerBytes);
    owner->block = task.block;
  }
  block_bytes_ -= pool.block_bytes();
  if (PageStock::Page page = pool.RemoveLast()) {
    garbage->push_back(std::move(page));
  }
}

void SupportTable::RemoveExpiredRows(Shard* shard, Task* task) {
  if (ttl_micros_ == 0) return;
  const int64_t until = ExpiredUntil();
  char* const rows = RowsOf(*shard, *task);
  int32_t kept = 0;
  for (int32_t i = 0; i < task->num_rows; ++i) {
    char* const row = rows + i * row_bytes_;
    if (HeadOf(row)->written <= until) continue;
    if (kept < i) std::memcpy(rows + kept * row_bytes_, row, row_bytes_);
    ++kept;
  }
  shard->counters.rows -= task->num_rows - kept;
  task->num_rows = static_cast<uint16_t>(kept);
}

void SupportTable::Erase(Shard* shard, int64_t id, Garbage* garbage) {
  const auto found = shard->tasks.find(id);
  if (found == shard->tasks.end()) return;
  const Task& task = found->second;
  shard->counters.rows -= task.num_rows;
  --num_tasks_;
  Release(shard, task, garbage);
  shard->ages.erase(task.age);
  shard->tasks.erase(found);
  shard->oldest = shard->ages.empty() ? kNever : shard->ages.begin()->first;
  Journal(shard, [&](std::vector<char>* out) { AppendDrop(id, out); });
}

void SupportTable::EvictOldestOf(Shard* shard, Garbage* garbage) {
  // A copy, as the id goes with its age.
  const int64_t id = shard->ages.begin()->second;
  Erase(shard, id, garbage);
  ++shard->counters.evicted;
}

void SupportTable::Drop(int64_t id) {
  Shard& shard = shards_[ShardOf(id)];
  Garbage garbage;
  std::lock_guard<std::mutex> lock(shard.mutex);
  Erase(&shard, id, &garbage);
}

bool SupportTable::EvictOldest() {
  if (!OverCapacity()) return false;
  std::lock_guard<std::mutex> evicting(evicting_);
  if (!OverCapacity()) return false;
  Shard* const shard = std::min_element(
      shards_.begin(), shards_.end(),
      [](const Shard& a, const Shard& b) { return a.oldest < b.oldest; });
  Garbage garbage;
  std::lock_guard<std::mutex> lock(shard->mutex);
  if (shard->ages.empty()) return false;
  EvictOldestOf(shard, &garbage);
  return true;
}

int SupportTable::ExpireSome(size_t number) {
  Shard& shard = shards_[number];
  const int64_t until = ExpiredUntil();
  if (shard.oldest > until) return 0;
  Garbage garbage;
  std::lock_guard<std::mutex> lock(shard.mutex);
  int evicted = 0;
  for (; evicted < kTasksAtOnce && shard.oldest <= until; ++evicted) {
    EvictOldestOf(&shard, &garbage);
  }
  return evicted;
}

int32_t SupportTable::Get(int64_t id, int64_t version, int32_t max_rows,
                          float* h, float* labels, float* weights,
                          int64_t* time, int64_t* event) {
  Shard& shard = shards_[ShardOf(id)];
  const int64_t until = ExpiredUntil();
  std::lock_guard<std::mutex> lock(shard.mutex);
  const auto found = shard.tasks.find(id);
  if (found == shard.tasks.end()) {
    ++shard.counters.misses;
    return 0;
  }
  const Task& task = found->second;
  const int32_t count = UnpackRows(shape_, RowsOf(shard, task), task.num_rows,
                                   version, until, max_rows, h, labels, weights,
                                   time, event, &shard.counters.refused);
  ++(count > 0 ? shard.counters.hits : shard.counters.misses);
  return count;
}

void SupportTable::DrainJournals(
    const std::function<void(const std::vector<char>&)>& take) {
  for (Shard& shard : shards_) {
    std::vector<char> journal;
    {
      std::lock_guard<std::mutex> lock(shard.mutex);
      journal.swap(shard.journal);
    }
    if (journal.empty()) continue;
    take(journal);
    journal_bytes_ -= journal.size();
  }
}

std::vector<int64_t> SupportTable::Tasks(size_t number) {
  Shard& shard = shards_[number];
  std::vector<int64_t> tasks;
  std::lock_guard<std::mutex> lock(shard.mutex);
  tasks.reserve(shard.tasks.size());
  for (const auto& age : shard.ages) tasks.push_back(age.second);
  return tasks;
}

void SupportTable::Copy(size_t number, const int64_t* tasks, size_t n,
                        std::vector<char>* records) {
  Shard& shard = shards_[number];
  std::lock_guard<std::mutex> lock(shard.mutex);
  for (size_t i = 0; i < n; ++i) {
    const auto found = shard.tasks.find(tasks[i]);
    if (found == shard.tasks.end()) continue;
    const Task& task = found->second;
    for (int32_t row = 0; row < task.num_rows; ++row) {
      AppendPut(tasks[i], RowsOf(shard, task) + row * row_bytes_, row_bytes_,
                records);
    }
  }
}

SupportCounters SupportTable::Counters() {
  SupportCounters sum;
  for (Shard& shard : shards_) {
    std::lock_guard<std::mutex> lock(shard.mutex);
    sum.rows += shard.counters.rows;
    sum.hits += shard.counters.hits;
    sum.misses += shard.counters.misses;
    sum.refused += shard.counters.refused;
    sum.evicted += shard.counters.evicted;
  }
  return sum;
}

}  // namespace qianmo
