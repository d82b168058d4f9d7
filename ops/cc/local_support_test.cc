#include "ops/cc/local_support.h"

#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "ops/cc/check.h"

namespace qianmo {
namespace {

namespace fs = std::filesystem;

constexpr int32_t kDim = 5, kLabels = 2, kRows = 6;
constexpr int64_t kSecond = 1'000'000;

std::atomic<int64_t> now{1000 * kSecond};

SupportOptions Options(const std::string& path = "") {
  SupportOptions options;
  options.shape = {kDim, kLabels, kRows};
  options.path = path;
  options.clock = [] { return now.load(); };
  return options;
}

std::unique_ptr<LocalSupport> Open(const SupportOptions& options) {
  std::string error;
  auto store = LocalSupport::Open(options, &error);
  if (!store) std::fprintf(stderr, "%s\n", error.c_str());
  CHECK(store);
  return store;
}

// A folder that is gone when the test ends.
class Folder {
 public:
  Folder() {
    char made[] = "/tmp/local_support_XXXXXX";
    CHECK(mkdtemp(made) != nullptr);
    path_ = made;
  }
  ~Folder() { fs::remove_all(path_); }
  std::string operator/(const char* name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

using Moments = std::vector<int64_t>;

// A row all of whose numbers tell task, time and salt.
int32_t Put(SupportStore* store, int64_t task, int64_t time, int salt = 0,
            int64_t version = 1, int64_t event = 0) {
  const float value = task * 10000 + time * 10 + salt;
  const std::vector<float> h(kDim, value), labels(kLabels, -value);
  const std::vector<float> weights(kLabels, value + 1);
  int32_t status;
  store->Put({1, &task, h.data(), labels.data(), weights.data(), &time, &event,
              &version},
             &status);
  return status;
}

// Reads the last rows of a task, and looks at every number.
Moments Times(SupportStore* store, int64_t task, int64_t version = 1,
              int32_t max_rows = kRows) {
  float h[kRows * kDim], labels[kRows * kLabels], weights[kRows * kLabels];
  int64_t time[kRows], event[kRows];
  int32_t n;
  store->Get(&task, 1, version,
             {max_rows, h, labels, weights, time, event, &n});
  for (int32_t i = 0; i < n; ++i) {
    const float value = h[i * kDim];
    const float salt = value - task * 10000 - time[i] * 10;
    CHECK(0 <= salt && salt < 10);
    for (int j = 0; j < kDim; ++j) CHECK(h[i * kDim + j] == value);
    for (int j = 0; j < kLabels; ++j) {
      CHECK(labels[i * kLabels + j] == -value);
      CHECK(weights[i * kLabels + j] == value + 1);
    }
    CHECK(i == 0 || time[i - 1] < time[i] ||
          (time[i - 1] == time[i] && event[i - 1] < event[i]));
  }
  return {time, time + n};
}

// Of an hour forward, an hour back and any other way of setting the system's
// clock, rows live as long as the steady one says.
void NoSettingOfTheClockKeepsRowsForLonger() {
  constexpr int64_t kHour = 3600 * kSecond, kTtl = 600 * kSecond;
  static std::atomic<int64_t> wall{9 * kHour}, steady{5};
  Folder folder;
  auto options = Options(folder / "store");
  options.clock = [] { return wall.load(); };
  options.steady = [] { return steady.load(); };
  options.limits.ttl_micros = kTtl;
  auto store = Open(options);
  Put(store.get(), 1, 1);
  wall += kHour;
  Put(store.get(), 2, 1);
  CHECK(Times(store.get(), 1).size() == 1);  // an hour has not passed
  wall -= kHour;
  Put(store.get(), 3, 1);
  wall -= kHour;
  Put(store.get(), 4, 1);
  wall += kHour + kTtl;
  steady += kTtl - 1;
  for (int64_t task = 1; task <= 4; ++task) {
    CHECK(Times(store.get(), task).size() == 1);
  }
  store.reset();  // as files say, too
  wall -= 1;
  store = Open(options);
  for (int64_t task = 1; task <= 4; ++task) {
    CHECK(Times(store.get(), task).size() == 1);
  }
  // After so many writes in a microsecond their times are apart, and ahead.
  wall += 100, steady += 100;
  for (int64_t task = 1; task <= 4; ++task) {
    CHECK(Times(store.get(), task).empty());
  }
  // A process that starts while the clock is ahead leaves rows of the future.
  wall += kHour;
  store.reset();
  store = Open(options);
  Put(store.get(), 5, 1);
  store.reset();
  wall -= kHour;
  store = Open(options);
  CHECK(Times(store.get(), 5).empty());
  options.limits.ttl_micros = 0;  // then nobody asks how old they are
  store.reset();
  CHECK(Times(Open(options).get(), 5).size() == 1);
}

// Tasks and times of a store in a folder, as it opens again.
std::vector<Moments> Reopened(const std::string& path, int64_t tasks) {
  auto store = Open(Options(path));
  std::vector<Moments> found;
  for (int64_t task = 0; task < tasks; ++task) {
    found.push_back(Times(store.get(), task));
  }
  return found;
}

void PagesComeAndGo() {
  const size_t block_bytes = 100'000;  // 5 in a page
  PageStock stock;
  BlockPool pool(block_bytes, &stock);
  for (int round = 0; round < 2; ++round) {
    for (char i = 0; i < 12; ++i) {
      CHECK(pool.Add());
      std::fill_n(pool.At(i), block_bytes, i);
    }
    for (char i = 0; i < 12; ++i) {
      CHECK(pool.At(i)[0] == i && pool.At(i)[block_bytes - 1] == i);
    }
    int pages = 0;
    while (pool.size() > 0) pages += pool.RemoveLast() != nullptr;
    CHECK(pages == 3);
  }
  BlockPool large(3'000'000, &stock);
  CHECK(large.Add() && large.Add());
  large.At(1)[2'999'999] = 1;
  CHECK(large.RemoveLast() != nullptr && large.RemoveLast() != nullptr);
}

void AnyChangeOfAWordShows() {
  const std::string words(24, 'x');
  const uint64_t sum = Checksum(words.data(), words.size());
  for (size_t bit = 0; bit < 8 * words.size(); ++bit) {
    std::string changed = words;
    changed[bit / 8] ^= 1 << bit % 8;
    CHECK(Checksum(changed.data(), changed.size()) != sum);
  }
  CHECK(Checksum(words.data(), 16) != sum);
}

void ATaskKeepsItsLastEvents() {
  auto store = Open(Options());
  for (const int64_t time : {50, 10, 30, 70, 20, 60, 40}) {
    CHECK(Put(store.get(), 1, time) == kStored);
  }
  CHECK((Times(store.get(), 1) == Moments{20, 30, 40, 50, 60, 70}));
  CHECK((Times(store.get(), 1, 1, 2) == Moments{60, 70}));
  CHECK(Put(store.get(), 1, 15) == kTooOld);
  CHECK(Put(store.get(), 1, 45, 3, /*version=*/2) == kStored);
  CHECK(Put(store.get(), 1, 45, 4, /*version=*/2) == kStored);
  CHECK((Times(store.get(), 1, 2) == Moments{45}));
  CHECK((Times(store.get(), 1) == Moments{30, 40, 50, 60, 70}));
  CHECK(store->Stats().rows == kRows);
  CHECK(store->Stats().refused == 6);
}

void EventsOfOneTimeAreToldApart() {
  Folder folder;
  const std::string path = folder / "store";
  auto store = Open(Options(path));
  const int64_t ids[] = {3, -1, 2, 3, INT64_MAX, INT64_MIN};
  for (const int64_t event : ids) {
    CHECK(Put(store.get(), 1, 50, 0, 1, event) == kStored);
  }
  CHECK(Times(store.get(), 1) == Moments(5, 50));
  CHECK(Put(store.get(), 1, 50, 7, 1, 2) == kStored);  // replaces
  CHECK(Times(store.get(), 1) == Moments(5, 50));
  CHECK(Put(store.get(), 1, 49, 0, 1, 9) == kStored);
  CHECK(Put(store.get(), 1, 51, 0, 1, -9) == kStored);
  CHECK((Times(store.get(), 1) == Moments{50, 50, 50, 50, 50, 51}));
  CHECK(Put(store.get(), 1, 49, 0, 1, 9) == kTooOld);
  CHECK(Put(store.get(), 1, 50, 0, 1, INT64_MIN) == kStored);
  store.reset();
  CHECK((Reopened(path, 2)[1] == Moments{50, 50, 50, 50, 50, 51}));
}

void FilesOfAnOlderFormatAreRefused() {
  Folder folder;
  const std::string path = folder / "store";
  Put(Open(Options(path)).get(), 1, 50);
  std::string header = "QIANMOS1";
  const int32_t sizes[] = {kDim, kLabels};
  header.append(reinterpret_cast<const char*>(sizes), sizeof(sizes));
  const uint64_t sum = Checksum(header.data(), header.size());
  header.append(reinterpret_cast<const char*>(&sum), sizeof(sum));
  std::FILE* const log = std::fopen((path + "/0.log").c_str(), "r+");
  CHECK(log != nullptr);
  CHECK(std::fwrite(header.data(), header.size(), 1, log) == 1);
  CHECK(std::fclose(log) == 0);
  std::string error;
  CHECK(!LocalSupport::Open(Options(path), &error));
  CHECK(error.find("/0.log` holds rows of format 1") != std::string::npos);
  CHECK(fs::file_size(path + "/0.log") > header.size());  // left as it was
}

// All sizes of tasks, which grow beside each other and go in any order.
void MemoryFollowsTheRows() {
  auto options = Options();
  options.shape.max_rows = 37;
  std::string error;
  const auto store = SupportStore::Shared("memory", options, &error);
  CHECK(store);
  for (int64_t time = 1; time <= 37; ++time) {
    for (int64_t task = 0; task < 740; ++task) {
      if (time <= task % 37 + 1) CHECK(Put(store.get(), task, time) == kStored);
    }
  }
  const int64_t raw = 740 / 37 * (37 * 38 / 2) * options.shape.row_bytes();
  CHECK(raw < store->Stats().bytes && store->Stats().bytes < 1.35 * raw);

  for (int64_t task = 0; task < 740; task += 3) Put(store.get(), task, 1);
  options.limits.max_tasks = 247;
  CHECK(SupportStore::Shared("memory", options, &error) == store);
  static_cast<LocalSupport*>(store.get())->Evict();
  CHECK(store->Stats().tasks == 247 && store->Stats().evicted == 493);
  float h[37 * kDim], labels[37 * kLabels], weights[37 * kLabels];
  int64_t time[37], event[37];
  for (int64_t task = 0; task < 740; ++task) {
    int32_t n;
    store->Get(&task, 1, 1, {37, h, labels, weights, time, event, &n});
    CHECK(n == (task % 3 == 0 ? task % 37 + 1 : 0));
    for (int32_t i = 0; i < n; ++i) {
      CHECK(time[i] == i + 1 && h[i * kDim] == task * 10000 + time[i] * 10);
    }
  }
  options.limits.ttl_micros = 1;
  CHECK(SupportStore::Shared("memory", options, &error) == store);
  now += kSecond;
  static_cast<LocalSupport*>(store.get())->Evict();
  CHECK(store->Stats().tasks == 0 && store->Stats().rows == 0);
  CHECK(store->Stats().bytes == 0);
}

void RowsPassTheirTimeOneByOne() {
  auto options = Options();
  options.limits.ttl_micros = 10 * kSecond;
  auto store = Open(options);
  for (int64_t time = 1; time <= 4; ++time) {
    Put(store.get(), 1, time);
    now += 2 * kSecond;
  }
  Put(store.get(), 2, 9);
  CHECK((Times(store.get(), 1) == Moments{1, 2, 3, 4}));
  now += 2 * kSecond;
  CHECK((Times(store.get(), 1) == Moments{2, 3, 4}));
  now += 2 * kSecond;
  CHECK((Times(store.get(), 1) == Moments{3, 4}));
  CHECK(store->Stats().rows == 5);
  const int64_t before = store->Stats().bytes;
  Put(store.get(), 1, 7);  // lets go of what is past its time
  CHECK((Times(store.get(), 1) == Moments{3, 4, 7}));
  CHECK(store->Stats().rows == 4);
  CHECK(store->Stats().bytes < before);
  now += 6 * kSecond;
  store->Evict();
  CHECK(store->Stats().tasks == 1 && store->Stats().evicted == 1);
  now += 4 * kSecond;
  store->Evict();
  CHECK(store->Stats().tasks == 0 && store->Stats().bytes == 0);
}

void FilesGiveBackWhatWasPut() {
  Folder folder;
  const std::string path = folder / "store";
  auto options = Options(path);
  options.limits = {/*ttl_micros=*/100 * kSecond, /*max_tasks=*/40, 0};
  std::string error;
  std::vector<Moments> expected;
  for (int round = 0; round < 6; ++round) {
    auto store = Open(options);
    for (int64_t task = 0; task < 60 && round > 0; ++task) {
      CHECK(Times(store.get(), task) == expected[task]);
    }
    CHECK(store->Stats().damaged_bytes == 0);
    for (int i = 0; i < 500; ++i) {
      now += kSecond / 100;
      Put(store.get(), i * 7919 % (61 + round) % 60, i * 31 % (20 + round) + 1);
      if (i % 200 == 100 && round % 2) CHECK(store->Compact(&error));
    }
    expected.clear();
    for (int64_t task = 0; task < 60; ++task) {
      expected.push_back(Times(store.get(), task));
    }
  }
}

// Whatever a snapshot misses or has twice, the log after it sets right.
void SnapshotsAreTakenWhileWritersWrite() {
  Folder folder;
  const std::string path = folder / "store";
  auto options = Options(path);
  options.limits.max_tasks = 200;
  auto store = Open(options);
  std::atomic<bool> done{false};
  std::vector<std::thread> writers;
  for (int seed = 0; seed < 3; ++seed) {
    writers.emplace_back([&store, &done, seed] {
      for (int64_t i = seed; !done; i += 3) {
        Put(store.get(), i * 7919 % 230, i % 50 + 1, i % 10);
        if (i % 64 == 0) std::this_thread::yield();
      }
    });
  }
  std::string error;
  for (int i = 0; i < 15; ++i) {
    CHECK(store->Compact(&error));
    CHECK(store->Export(folder / "exported", &error));
  }
  done = true;
  for (std::thread& writer : writers) writer.join();
  std::vector<Moments> expected;
  for (int64_t task = 0; task < 230; ++task) {
    expected.push_back(Times(store.get(), task));
  }
  store.reset();
  CHECK(Reopened(path, 230) == expected);
  int files = 0;
  for (const auto& file : fs::directory_iterator(path))
    files += !!file.exists();
  CHECK(files == 3);  // LOCK, log, snapshot
}

void ASnapshotThatFailsLosesNothing() {
  Folder folder;
  const std::string path = folder / "store";
  auto store = Open(Options(path));
  std::string error;
  for (int64_t time = 1; time <= 3; ++time) {
    Put(store.get(), time, time);
    const std::string next = path + "/" + std::to_string(time);
    if (time > 1) fs::create_directories(next + ".snapshot.writing/in the way");
    CHECK(store->Compact(&error) == (time == 1));
  }
  CHECK(error.find("3.snapshot.writing") != std::string::npos);
  CHECK(store->Stats().write_errors == 2);
  Put(store.get(), 4, 4);
  store.reset();
  for (const int64_t number : {2, 3}) {
    fs::remove_all(path + "/" + std::to_string(number) + ".snapshot.writing");
  }
  CHECK((Reopened(path, 5) == std::vector<Moments>{{}, {1}, {2}, {3}, {4}}));
  store = Open(Options(path));
  CHECK(store->Compact(&error));
  CHECK(!fs::exists(path + "/1.log") && !fs::exists(path + "/3.log"));
  store.reset();
  CHECK((Reopened(path, 5) == std::vector<Moments>{{}, {1}, {2}, {3}, {4}}));
}

// As on a disk that is full for a while.
void ALogThatFailsIsMadeGoodByASnapshot() {
  Folder folder;
  const std::string path = folder / "store";
  signal(SIGXFSZ, SIG_IGN);
  rlimit before;
  CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0);
  auto store = Open(Options(path));
  Put(store.get(), 0, 1);
  store->Flush();
  rlimit full = before;
  full.rlim_cur = 1000;
  CHECK(setrlimit(RLIMIT_FSIZE, &full) == 0);
  for (int64_t task = 1; task < 100; ++task) Put(store.get(), task, 1);
  store->Flush();
  CHECK(setrlimit(RLIMIT_FSIZE, &before) == 0);
  CHECK(store->Stats().write_errors > 0);
  for (int i = 0; !fs::exists(path + "/1.snapshot"); ++i) {
    CHECK(i < 600);  // it comes by itself within seconds
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  store.reset();
  for (const Moments& times : Reopened(path, 100)) CHECK(times == Moments{1});
}

// Here for want of a descriptor: the lock and the log take the last two.
void AFolderThatCannotBeSyncedIsNamed() {
  Folder folder;
  const std::string path = folder / "store";
  rlimit before;
  CHECK(getrlimit(RLIMIT_NOFILE, &before) == 0);
  const int next = dup(0);
  CHECK(next >= 0 && close(next) == 0);
  rlimit two = before;
  two.rlim_cur = next + 2;
  CHECK(setrlimit(RLIMIT_NOFILE, &two) == 0);
  std::string error;
  CHECK(!LocalSupport::Open(Options(path), &error));
  CHECK(setrlimit(RLIMIT_NOFILE, &before) == 0);
  CHECK(error.find("Cannot sync `" + path + "`: ") == 0);
}

void AKilledProcessKeepsWhatWasFlushed() {
  Folder folder;
  const std::string path = folder / "store";
  int ready[2];
  CHECK(pipe(ready) == 0);
  const pid_t child = fork();
  if (child == 0) {
    auto store = Open(Options(path));
    for (int64_t task = 0; task < 50; ++task) Put(store.get(), task, 1);
    store->Flush();
    CHECK(write(ready[1], "x", 1) == 1);
    for (int64_t time = 2;; ++time) Put(store.get(), 1, time);
  }
  char got;
  CHECK(read(ready[0], &got, 1) == 1);
  CHECK(kill(child, SIGKILL) == 0);
  CHECK(waitpid(child, nullptr, 0) == child);
  auto store = Open(Options(path));
  for (int64_t task = 0; task < 50; ++task) {
    CHECK(!Times(store.get(), task).empty());
  }
}

void AProcessThatEndsKeepsWhatWasPut() {
  Folder folder;
  const std::string path = folder / "store";
  const pid_t child = fork();
  if (child == 0) {
    std::string error;
    // Never closed, as TensorFlow's resources are at the end of a process.
    static auto* const store = new std::shared_ptr<SupportStore>(
        SupportStore::Shared("ends", Options(path), &error));
    for (int64_t task = 0; task < 50; ++task) Put(store->get(), task, 1);
    std::exit(0);
  }
  CHECK(waitpid(child, nullptr, 0) == child);
  for (const Moments& times : Reopened(path, 50)) CHECK(times == Moments{1});
}

void AStoreClosesWithItsLastHolder() {
  Folder folder;
  std::string error;
  std::vector<std::thread> threads;
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([&folder, i] {
      for (int64_t time = 1; time <= 15; ++time) {
        std::string error;
        auto store =
            SupportStore::Shared("shared", Options(folder / "s"), &error);
        CHECK(store);
        Put(store.get(), i, time);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  auto store = Open(Options(folder / "s"));
  for (int64_t i = 0; i < 6; ++i) CHECK(Times(store.get(), i).size() == kRows);
  CHECK(!SupportStore::Shared("shared", Options(folder / "s"), &error));
  CHECK(error.find("has `") != std::string::npos);
}

void EveryoneAtOnce() {
  Folder folder;
  auto options = Options(folder / "store");
  options.limits = {/*ttl_micros=*/kSecond, /*max_tasks=*/150, 0};
  auto store = Open(options);
  std::atomic<int> writing{4};
  std::vector<std::thread> threads;
  for (int seed = 0; seed < 4; ++seed) {
    threads.emplace_back([&, seed] {
      for (int64_t i = seed; i < 8'000; i += 4) {
        now += 100;
        Put(store.get(), i * 7919 % 211, i % 40 + 1, i % 10, i % 2);
      }
      --writing;
    });
    threads.emplace_back([&, seed] {
      for (int64_t i = seed; writing > 0; ++i) {
        Times(store.get(), i % 211, i % 2);
        if (i % 1000 == 0) CHECK(store->Stats().tasks <= 155);
      }
    });
  }
  threads.emplace_back([&] {
    while (writing > 0) {
      store->Evict();
      store->Flush();
    }
  });
  threads.emplace_back([&] {
    std::string error;
    while (writing > 0) CHECK(store->Export(folder / "rows", &error));
    CHECK(store->Import(folder / "rows", &error));
  });
  for (std::thread& thread : threads) thread.join();
  CHECK(store->Stats().tasks <= 150 && store->Stats().evicted > 0);
  now += kSecond;
  store->Evict();
  CHECK(store->Stats().tasks == 0 && store->Stats().bytes == 0);
}

}  // namespace
}  // namespace qianmo

int main() {
  // These fork, hence before there are threads.
  qianmo::AKilledProcessKeepsWhatWasFlushed();
  qianmo::AProcessThatEndsKeepsWhatWasPut();
  qianmo::PagesComeAndGo();
  qianmo::AnyChangeOfAWordShows();
  qianmo::ATaskKeepsItsLastEvents();
  qianmo::EventsOfOneTimeAreToldApart();
  qianmo::FilesOfAnOlderFormatAreRefused();
  qianmo::MemoryFollowsTheRows();
  qianmo::RowsPassTheirTimeOneByOne();
  qianmo::NoSettingOfTheClockKeepsRowsForLonger();
  qianmo::FilesGiveBackWhatWasPut();
  qianmo::SnapshotsAreTakenWhileWritersWrite();
  qianmo::ASnapshotThatFailsLosesNothing();
  qianmo::ALogThatFailsIsMadeGoodByASnapshot();
  qianmo::AFolderThatCannotBeSyncedIsNamed();
  qianmo::AStoreClosesWithItsLastHolder();
  qianmo::EveryoneAtOnce();
}
