#include "ops/cc/redis_support.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstring>
#include <limits>
#include <numeric>
#include <string_view>
#include <utility>

#include "ops/cc/support_log.h"

namespace qianmo {
namespace {

constexpr std::chrono::milliseconds kPoll{100};
// Of a round trip: a row to put costs Redis more than a task to read.
constexpr size_t kRowsAtOnce = 256, kTasksAtOnce = 1024;
constexpr size_t kBytesAtOnce = size_t{8} << 20;  // to read
constexpr size_t kIdChars = 20;

// KEYS: of the task. ARGV: bytes of a row, rows of a task at most, their
// time-to-live (microseconds, 0 for ever), the writer's clock (microseconds
// since 1970), then rows. Returns a byte for each of them, its SupportStatus.
//
// Of the clocks of the writer and of the Redis the one that is behind counts,
// so that one that is ahead does not date rows into the future.
//
// Lua's numbers are exact up to 2^53, which times of writing stay below until
// the year 2255. Those of events, and their ids, may be larger, hence halves.
constexpr char kPutScript[] = R"lua(
local size, most, ttl = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local clock = redis.call('TIME')
local now = math.min(tonumber(ARGV[4]), clock[1] * 1000000 + clock[2])
local past = ttl > 0 and now - ttl or -1
local old = redis.call('GET', KEYS[1]) or ''
if #old % size ~= 0 then
  return redis.error_reply('the rows of ' .. KEYS[1] .. ' cannot be read')
end
local rows, status, last = {}, {}, 0
local function written(row) return (struct.unpack('<I8', row, 25)) end
local function order(one, two, at)
  local low1, high1 = struct.unpack('<I4i4', one, at)
  local low2, high2 = struct.unpack('<I4i4', two, at)
  if high1 ~= high2 then return high1 - high2 end
  return low1 - low2
end
local function later(one, two)
  local time = order(one, two, 1)
  return time > 0 or time == 0 and order(one, two, 9) > 0
end
for at = 1, #old, size do
  local row = old:sub(at, at + size - 1)
  local when = written(row)
  if when > past then
    rows[#rows + 1] = row
    last = math.max(last, math.min(when, now))
  end
end
while #rows > most do table.remove(rows, 1) end
for i = 5, #ARGV do
  local row, at = ARGV[i], #rows
  if written(row) > now then
    row = row:sub(1, 24) .. struct.pack('<I8', now) .. row:sub(33)
  end
  while at > 0 and later(rows[at], row) do at = at - 1 end
  status[i - 4] = '\0'
  if at > 0 and rows[at]:sub(1, 16) == row:sub(1, 16) then
    rows[at] = row
  elseif #rows < most then
    table.insert(rows, at + 1, row)
  elseif at > 0 then
    table.remove(rows, 1)
    table.insert(rows, at, row)
  else
    status[i - 4] = '\8'
  end
  if status[i - 4] == '\0' then last = math.max(last, written(row)) end
end
local value = table.concat(rows)
if ttl == 0 then
  redis.call('SET', KEYS[1], value)
else
  -- A row that is imported may have passed its time on the way.
  local left = math.max(1, math.ceil((last - past) / 1000))
  redis.call('SET', KEYS[1], value, 'PX', string.format('%.0f', left))
end
return table.concat(status)
)lua";

// The number that follows a name in the text of INFO; 0 without one.
int64_t NumberAfter(std::string_view text, std::string_view name) {
  const size_t at = text.find(name);
  int64_t number = 0;
  if (at == std::string_view::npos) return 0;
  text.remove_prefix(at + name.size());
  std::from_chars(text.data(), text.data() + text.size(), number);
  return number;
}

// Keys of tasks that begin alike.
class TaskKeys {
 public:
  TaskKeys(const std::string& begin, uint16_t begin_hash, size_t most)
      : begin_(begin), begin_hash_(begin_hash) {
    text_.reserve(most * (begin.size() + kIdChars));  // keys point into it
    keys_.reserve(most);
  }

  void Add(int64_t task) {
    char digits[kIdChars];
    const char* const end = std::to_chars(digits, digits + kIdChars, task).ptr;
    const std::string_view id(digits, static_cast<size_t>(end - digits));
    const size_t at = text_.size();
    text_ += begin_;
    text_ += id;
    keys_.push_back(
        {std::string_view(text_).substr(at), RedisHash(id, begin_hash_)});
  }

  const std::vector<RedisKey>& keys() const { return keys_; }

 private:
  const std::string& begin_;
  const uint16_t begin_hash_;
  std::string text_;
  std::vector<RedisKey> keys_;
};

}  // namespace

std::unique_ptr<RedisSupport> RedisSupport::Open(const SupportOptions& options,
                                                 std::string* error) {
  if (options.path.find("on_failure=") != std::string::npos) {
    *error =
        "`on_failure` is for embeddings. Leave it out of the URL: tasks whose "
        "support cannot be read count as unknown";
    return nullptr;
  }
  auto client = RedisClient::Open(options.path, error);
  if (client == nullptr) return nullptr;
  std::unique_ptr<RedisSupport> store(
      new RedisSupport(options, std::move(client)));
  const std::string key = store->keys_ + "0";
  const auto found = store->client_->Get({{key, RedisHash(key)}});
  if (found.values[0].size == RedisValue::kLost) {
    *error = store->client_->name() + ": " + found.error;
    return nullptr;
  }
  return store;
}

RedisSupport::RedisSupport(const SupportOptions& options,
                           std::shared_ptr<RedisClient> client)
    : SupportStore(options),
      client_(std::move(client)),
      keys_(client_->url().prefix + ":v2:" + std::to_string(shape().dim) + "x" +
            std::to_string(shape().num_labels) + ":"),
      keys_hash_(RedisHash(keys_)),
      row_bytes_(shape().row_bytes()),
      tasks_at_once_(std::clamp<size_t>(
          kBytesAtOnce / (row_bytes_ * static_cast<size_t>(shape().max_rows)),
          1, kTasksAtOnce)),
      ttl_micros_(options.limits.ttl_micros),
      maintenance_(kPoll, [client = client_] { client->Maintain(); }) {}

int64_t RedisSupport::ExpiredUntil() const {
  const int64_t ttl = ttl_micros_;
  return ttl > 0 ? std::max<int64_t>(options_.clock() - ttl, -1) : -1;
}

std::string RedisSupport::Write(Row* rows, size_t num_rows) {
  const std::string row_bytes = std::to_string(row_bytes_);
  const std::string max_rows = std::to_string(shape().max_rows);
  const std::string ttl = std::to_string(ttl_micros_);
  const std::string now = std::to_string(options_.clock());
  TaskKeys tasks(keys_, keys_hash_, num_rows);
  std::vector<size_t> begins;  // of each task's rows
  for (size_t i = 0; i < num_rows; ++i) {
    if (i > 0 && rows[i].task == rows[i - 1].task) continue;
    tasks.Add(rows[i].task);
    begins.push_back(i);
  }
  begins.push_back(num_rows);
  const auto add = [&](size_t key, RedisConnection* connection) {
    connection->AddCommand(8 + begins[key + 1] - begins[key]);
    for (const std::string_view word :
         {std::string_view("EVAL"), std::string_view(kPutScript),
          std::string_view("1"), tasks.keys()[key].text,
          std::string_view(row_bytes), std::string_view(max_rows),
          std::string_view(ttl), std::string_view(now)}) {
      connection->AddWord(word);
    }
    for (size_t i = begins[key]; i < begins[key + 1]; ++i) {
      connection->AddWord({rows[i].bytes, row_bytes_});
    }
  };
  const auto answers = client_->Call(tasks.keys(), add);
  std::string error;
  for (size_t key = 0; key < tasks.keys().size(); ++key) {
    const RedisValue& value = answers.values[key];
    const size_t begin = begins[key], end = begins[key + 1];
    const bool stored = value.size == static_cast<int64_t>(end - begin);
    if (!stored) {
      write_errors_ += static_cast<int64_t>(end - begin);
      error = answers.error.empty() ? "its reply is none of the script"
                                    : answers.error;
    }
    for (size_t i = begin; i < end; ++i) {
      rows[i].status = kUnreachable;
      if (stored) rows[i].status = value.data[i - begin];
    }
  }
  return error;
}

void RedisSupport::Put(const SupportBatch& rows, int32_t* status) {
  const size_t dim = shape().dim, num_labels = shape().num_labels;
  const int64_t now = options_.clock();
  // A task's rows together, and in the order in which they came.
  std::vector<size_t> order(rows.num_rows);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&rows](size_t a, size_t b) {
    return rows.task[a] < rows.task[b];
  });
  std::vector<char> bytes(std::min(kRowsAtOnce, rows.num_rows) * row_bytes_);
  std::vector<Row> good;
  std::vector<size_t> places;
  for (size_t next = 0; next < order.size();) {
    good.clear();
    places.clear();
    for (; next < order.size() && good.size() < kRowsAtOnce; ++next) {
      const size_t i = order[next];
      char* const row = bytes.data() + good.size() * row_bytes_;
      status[i] =
          PackRow(shape(), rows.h + i * dim, rows.labels + i * num_labels,
                  rows.weights + i * num_labels, rows.time[i], rows.event[i],
                  rows.version[i], row);
      if (status[i] != kStored) continue;
      std::memcpy(row + offsetof(RowHead, written), &now, sizeof(now));
      good.push_back({rows.task[i], row, kStored});
      places.push_back(i);
    }
    Write(good.data(), good.size());
    for (size_t i = 0; i < good.size(); ++i) status[places[i]] = good[i].status;
  }
}

void RedisSupport::Get(const int64_t* tasks, size_t num_tasks, int64_t version,
                       const SupportRoom& room) {
  const size_t dim = shape().dim, num_labels = shape().num_labels;
  const int64_t until = ExpiredUntil();
  int64_t refused = 0;
  for (size_t begin = 0; begin < num_tasks; begin += tasks_at_once_) {
    const size_t end = std::min(begin + tasks_at_once_, num_tasks);
    TaskKeys keys(keys_, keys_hash_, end - begin);
    for (size_t i = begin; i < end; ++i) keys.Add(tasks[i]);
    const auto answers = client_->Get(keys.keys());
    for (size_t i = begin; i < end; ++i) {
      const RedisValue& value = answers.values[i - begin];
      const size_t first = i * room.max_rows;
      room.count[i] = 0;
      if (value.size == RedisValue::kNone) {
        ++misses_;
      } else if (value.size < 0 || value.size % row_bytes_ != 0) {
        ++read_errors_;
      } else {
        room.count[i] = UnpackRows(
            shape(), value.data, static_cast<int32_t>(value.size / row_bytes_),
            version, until, room.max_rows, room.h + first * dim,
            room.labels + first * num_labels, room.weights + first * num_labels,
            room.time + first, room.event + first, &refused);
        ++(room.count[i] > 0 ? hits_ : misses_);
      }
    }
  }
  refused_ += refused;
}

SupportStats RedisSupport::Stats() {
  SupportStats stats;
  const auto take = [&stats](std::string_view text) {
    stats.tasks += NumberAfter(text, "\ndb0:keys=");
    stats.bytes += NumberAfter(text, "\nused_memory:");
    stats.evicted += NumberAfter(text, "\nexpired_keys:") +
                     NumberAfter(text, "\nevicted_keys:");
  };
  std::string error;
  if (!client_->Info(take, &error))
    stats.tasks = stats.bytes = stats.evicted = -1;
  stats.rows = -1;
  stats.hits = hits_;
  stats.misses = misses_;
  stats.refused = refused_;
  stats.write_errors = write_errors_;
  stats.read_errors = read_errors_;
  return stats;
}

bool RedisSupport::AppendTasks(const std::string* keys, size_t num_keys,
                               std::vector<char>* records, std::string* error) {
  std::vector<RedisKey> asked;
  for (size_t i = 0; i < num_keys; ++i) {
    asked.push_back({keys[i], RedisHash(keys[i])});
  }
  const auto answers = client_->Get(asked);
  const int64_t until = ExpiredUntil();
  for (size_t i = 0; i < num_keys; ++i) {
    const RedisValue& value = answers.values[i];
    if (value.size == RedisValue::kNone) continue;  // expired just now
    int64_t task;
    const char* const end = keys[i].data() + keys[i].size();
    const auto parsed =
        std::from_chars(keys[i].data() + keys_.size(), end, task);
    if (value.size < 0 || value.size % row_bytes_ != 0 ||
        parsed.ec != std::errc() || parsed.ptr != end) {
      *error = client_->name() + ": key " + keys[i] + ": " +
               (value.size == RedisValue::kLost ? answers.error
                                                : "it is none of a task");
      return false;
    }
    for (int64_t at = 0; at < value.size; at += row_bytes_) {
      RowHead head;
      std::memcpy(&head, value.data + at, sizeof(head));
      if (head.written <= until) continue;
      AppendPut(task, value.data + at, row_bytes_, records);
    }
  }
  return true;
}

bool RedisSupport::Export(const std::string& path, std::string* error) {
  uint64_t bytes;
  const auto fill = [this](LogFile* file, std::string* fault) {
    std::vector<char> records;
    const auto take = [&](const std::vector<std::string>& keys) {
      for (size_t begin = 0; begin < keys.size(); begin += tasks_at_once_) {
        const size_t n = std::min(tasks_at_once_, keys.size() - begin);
        records.clear();
        if (!AppendTasks(keys.data() + begin, n, &records, fault) ||
            !file->Append(records)) {
          return false;
        }
      }
      return true;
    };
    return client_->Scan(keys_ + "*", take, fault);
  };
  return WriteWhole(path, shape(), fill, &bytes, error);
}

bool RedisSupport::Import(const std::string& path, std::string* error) {
  LogContent content;
  const int64_t now = options_.clock(), until = ExpiredUntil();
  std::vector<char> bytes(kRowsAtOnce * row_bytes_);
  std::vector<Row> rows;
  std::string fault;
  const auto write = [&] {
    std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) {
      return a.task < b.task;
    });
    if (fault.empty()) fault = Write(rows.data(), rows.size());
    rows.clear();
  };
  const auto put = [&](int64_t task, const char* row) {
    RowHead head;
    std::memcpy(&head, row, sizeof(head));
    // A clock that was ahead must not keep rows for longer.
    head.written = std::min(head.written, now);
    if (head.written <= until) return;
    char* const copy = bytes.data() + rows.size() * row_bytes_;
    std::memcpy(copy, row, row_bytes_);
    std::memcpy(copy, &head, sizeof(head));
    rows.push_back({task, copy, kStored});
    if (rows.size() == kRowsAtOnce) write();
  };
  if (!ReadLog(path, shape(), put, [](int64_t) {}, &content, error)) {
    return false;
  }
  write();
  if (fault.empty()) return content.IsWhole(path, error);
  *error = client_->name() + ": " + fault;
  return false;
}

}  // namespace qianmo
