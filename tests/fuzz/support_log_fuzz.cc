// Fuzzes the files of the support store: a snapshot and a log of any bytes hold
// the rows that a plain reader finds in them, and damage is counted.
//
// An input is a byte of options and two files, the first one's size before
// them. The mutator changes a record and then, mostly, makes its sum right.

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "ops/cc/local_support.h"
#include "tests/fuzz/harness.h"

namespace qianmo::fuzz {
namespace {

constexpr SupportShape kShape = {3, 2, 4};
constexpr size_t kRow = 64;  // 32 of the head, 7 floats, padding
constexpr size_t kPut = 16 + kRow + 8, kDrop = 24, kHeader = 24;
constexpr int64_t kNow = 1'000'000'000, kTtl = 1'000'000;

struct Input {
  bool has_ttl = false;
  std::string snapshot, log;
};

Input Unpack(const std::string& bytes) {
  Input input;
  if (bytes.size() < 3) return input;
  input.has_ttl = bytes[0] & 1;
  const size_t size = Load<uint16_t>(bytes.data() + 1);
  input.snapshot = bytes.substr(3, size);
  input.log = bytes.substr(std::min(bytes.size(), 3 + size));
  return input;
}

std::string Pack(const Input& input) {
  std::string bytes(3, '\0');
  bytes[0] = input.has_ttl;
  Store(static_cast<uint16_t>(input.snapshot.size()), &bytes[1]);
  return bytes + input.snapshot + input.log;
}

uint64_t PlainSum(const char* data, size_t size) {
  uint64_t sum = size;
  for (size_t i = 0; i < size; i += 8) {
    sum = (sum ^ Load<uint64_t>(data + i)) * 0x9E3779B97F4A7C15u;
    sum ^= sum >> 32;
  }
  return sum;
}

// A record of that kind and size at a place, by the description in
// support_log.h.
bool Stands(const std::string& file, size_t at, const char* kind, size_t size) {
  return file.size() >= at + size && file.compare(at, 8, kind) == 0 &&
         PlainSum(file.data() + at, size - 8) ==
             Load<uint64_t>(file.data() + at + size - 8);
}

struct Change {
  int64_t task;
  std::string row;  // none drops the task

  bool operator==(const Change& other) const {
    return task == other.task && row == other.row;
  }
};

struct PlainLog {
  bool fits = true;  // of this format and shape
  std::vector<Change> changes;
  uint64_t end = 0, damaged = 0;
};

PlainLog PlainRead(const std::string& file) {
  PlainLog log;
  log.damaged = file.size();
  if (file.size() < kHeader) return log;
  log.end = kHeader;
  if (Stands(file, 0, "QIANMOS1", kHeader)) log.fits = false;
  if (Stands(file, 0, "QIANMOS2", kHeader)) {
    log.damaged -= kHeader;
    log.fits = Load<uint32_t>(&file[8]) == 3 && Load<uint32_t>(&file[12]) == 2;
  }
  for (size_t at = kHeader; log.fits && at < file.size();) {
    size_t size = 0;
    if (Stands(file, at, "QSPUTROW", kPut)) {
      size = kPut;
    } else if (Stands(file, at, "QSDROPTK", kDrop)) {
      size = kDrop;
    }
    if (size == 0) {
      ++at;
      continue;
    }
    log.changes.push_back({Load<int64_t>(&file[at + 8]),
                           size == kPut ? file.substr(at + 16, kRow) : ""});
    at += size;
    log.end = at;
    log.damaged -= size;
  }
  return log;
}

// Rows of a task by time and event.
using Rows = std::map<std::pair<int64_t, int64_t>, std::string>;
using Tasks = std::map<int64_t, Rows>;

// What is in a store after these changes of its files.
void Apply(const PlainLog& log, bool has_ttl, Tasks* tasks) {
  for (const auto& [task, row] : log.changes) {
    if (row.empty()) {
      tasks->erase(task);
      continue;
    }
    const auto written = Load<int64_t>(&row[24]);
    if (has_ttl && (written > kNow || written <= kNow - kTtl)) continue;
    if (!has_ttl && written == INT64_MIN) continue;  // no time is before it
    Rows& rows = (*tasks)[task];
    rows[{Load<int64_t>(&row[0]), Load<int64_t>(&row[8])}] = row;
    if (rows.size() > 4) rows.erase(rows.begin());
  }
}

SupportOptions Options(const std::string& path, bool has_ttl) {
  SupportOptions options;
  options.shape = kShape;
  options.path = path;
  options.limits.ttl_micros = has_ttl ? kTtl : 0;
  options.clock = [] { return kNow; };
  return options;
}

void CheckStore(SupportStore* store, const Tasks& tasks) {
  int64_t count = 0;
  for (const auto& [task, rows] : tasks) {
    count += static_cast<int64_t>(rows.size());
    std::map<int64_t, std::vector<std::string>> by_version;
    for (const auto& [key, row] : rows) {
      by_version[Load<int64_t>(&row[16])].push_back(row);
    }
    for (const auto& [version, wanted] : by_version) {
      float h[4 * 3], labels[4 * 2], weights[4 * 2];
      int64_t time[4], event[4];
      int32_t n = 0;
      store->Get(&task, 1, version, {4, h, labels, weights, time, event, &n});
      const std::string what = "task " + std::to_string(task);
      EXPECT(n == static_cast<int32_t>(wanted.size()), what);
      for (int32_t i = 0; i < n; ++i) {
        const char* const row = wanted[static_cast<size_t>(i)].data();
        EXPECT(Load<int64_t>(row) == time[i], what);
        EXPECT(Load<int64_t>(row + 8) == event[i], what);
        EXPECT(std::memcmp(row + 32, h + i * 3, 12) == 0, what);
        EXPECT(std::memcmp(row + 44, labels + i * 2, 8) == 0, what);
        EXPECT(std::memcmp(row + 52, weights + i * 2, 8) == 0, what);
      }
    }
  }
  EXPECT(store->Stats().rows == count, std::to_string(count));
  EXPECT(store->Stats().tasks == static_cast<int64_t>(tasks.size()), "tasks");
}

void CheckReadLog(const std::string& path, const PlainLog& plain) {
  std::vector<Change> changes;
  LogContent content;
  std::string error;
  const bool read = ReadLog(
      path, kShape,
      [&](int64_t task, const char* row) {
        changes.push_back({task, std::string(row, kRow)});
      },
      [&](int64_t task) { changes.push_back({task, ""}); }, &content, &error);
  EXPECT(read == plain.fits, error);
  EXPECT(read || error.find(path) != std::string::npos, error);
  if (!read) return;
  EXPECT(changes == plain.changes, path);
  EXPECT(content.end == plain.end, path);
  EXPECT(content.damaged == plain.damaged, path);
}

}  // namespace
}  // namespace qianmo::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace qianmo::fuzz;
  const Input input =
      Unpack(std::string(reinterpret_cast<const char*>(data), size));
  const std::string folder = EmptyFolder();
  WriteFile(folder + "/4.snapshot", input.snapshot);
  WriteFile(folder + "/4.log", input.log);
  const PlainLog snapshot = PlainRead(input.snapshot);
  const PlainLog log = PlainRead(input.log);
  CheckReadLog(folder + "/4.snapshot", snapshot);
  CheckReadLog(folder + "/4.log", log);

  const auto options = Options(folder, input.has_ttl);
  std::string error;
  auto store = qianmo::LocalSupport::Open(options, &error);
  EXPECT((store != nullptr) == (snapshot.fits && log.fits), error);
  if (store == nullptr) {
    EXPECT(error.find(folder) != std::string::npos, error);
    return 0;
  }
  Tasks tasks;
  Apply(snapshot, input.has_ttl, &tasks);
  Apply(log, input.has_ttl, &tasks);
  CheckStore(store.get(), tasks);
  EXPECT(store->Stats().damaged_bytes ==
             static_cast<int64_t>(snapshot.damaged + log.damaged),
         "damaged bytes");

  if (input.has_ttl) return 0;  // a row more would be of the next microsecond

  // What was read is still there after a row more, a new opening, a compaction
  // and the way through an exported file.
  const int64_t task = 77, time = 5, event = 6, version = 7;
  const float numbers[3] = {1, 2, 3};
  int32_t status = -1;
  store->Put({1, &task, numbers, numbers, numbers, &time, &event, &version},
             &status);
  Rows& rows = tasks[task];
  if (status == qianmo::kStored) {
    std::string row(kRow, '\0');
    qianmo::PackRow(kShape, numbers, numbers, numbers, time, event, version,
                    row.data());
    rows[{time, event}] = row;
    if (rows.size() > 4) rows.erase(rows.begin());
  }
  EXPECT(rows.size() == 4 || status == qianmo::kStored, "the task had room");
  store.reset();
  store = qianmo::LocalSupport::Open(options, &error);
  EXPECT(store != nullptr, error);
  CheckStore(store.get(), tasks);
  EXPECT(store->Compact(&error), error);
  EXPECT(store->Export(folder + "/exported", &error), error);
  store.reset();
  store = qianmo::LocalSupport::Open(options, &error);
  EXPECT(store != nullptr, error);
  CheckStore(store.get(), tasks);
  EXPECT(store->Stats().damaged_bytes == 0, "damage outlives a compaction");
  const auto copy = qianmo::LocalSupport::Open(Options("", false), &error);
  EXPECT(copy->Import(folder + "/exported", &error), error);
  CheckStore(copy.get(), tasks);
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size,
                                          size_t max_size, unsigned int seed) {
  using namespace qianmo::fuzz;
  std::mt19937 random(seed);
  Input input = Unpack(std::string(reinterpret_cast<char*>(data), size));
  std::string& file = random() % 2 == 0 ? input.snapshot : input.log;
  const uint32_t what = random() % 16;
  if (what == 0) {
    input.has_ttl = !input.has_ttl;
  } else if (what == 1 || file.size() < kHeader) {
    Mutate(&file, file.size() + 64);
  } else {
    // Records by their size, a header first. A damaged one moves those after.
    std::vector<std::string> records = {file.substr(0, kHeader)};
    for (size_t at = kHeader; at < file.size();) {
      const bool is_put = file.compare(at, 8, "QSPUTROW") == 0;
      records.push_back(file.substr(at, is_put ? kPut : kDrop));
      at += records.back().size();
    }
    std::string& record = records[random() % records.size()];
    const std::string other = records[random() % records.size()];
    if (what < 4) {
      record = other + record;
    } else if (what < 6) {
      record.clear();
    } else if (what == 6) {
      Mutate(&record, record.size() + 16);
    } else if (record.size() >= kDrop) {
      // Tasks, times and events are often those of another record.
      const size_t at = random() % (record.size() / 8 - 1) * 8 + 8;
      if (at + 8 < record.size()) {
        std::string word = record.substr(at, 8);
        if (random() % 3 == 0 && at + 8 <= other.size()) {
          word = other.substr(at, 8);
        } else {
          Mutate(&word, 8);
          word.resize(8);
        }
        record.replace(at, 8, word);
      }
      Store(PlainSum(record.data(), record.size() - 8),
            &record[record.size() - 8]);
    }
    file.clear();
    for (const std::string& each : records) file += each;
  }
  if (input.snapshot.size() > 60000) input.snapshot.resize(60000);
  return Give(Pack(input), data, size, max_size);
}
