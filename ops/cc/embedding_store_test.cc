#include "ops/cc/embedding_store.h"

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "ops/cc/check.h"

namespace qianmo {
namespace {

template <typename T>
void Append(std::string* bytes, T value) {
  bytes->append(reinterpret_cast<const char*>(&value), sizeof(value));
}

std::string Hex(uint32_t crc) {
  char text[9];
  std::snprintf(text, sizeof(text), "%08x", crc);
  return text;
}

void Write(const std::string& path, const std::string& bytes) {
  std::ofstream(path + ".new", std::ios::binary) << bytes;
  std::filesystem::rename(path + ".new", path);
}

// A store of versions with one table `t`, whose one row is the version.
class Folder {
 public:
  Folder() {
    char made[] = "/tmp/qianmo_XXXXXX";
    CHECK(mkdtemp(made) != nullptr);
    path_ = made;
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  const std::string& path() const { return path_; }

  void Add(int64_t version, int64_t space = 1) const {
    std::string data;
    Append(&data, static_cast<float>(version));
    const uint32_t crc = Crc32(data.data(), data.size());
    std::string header = "QMROWS1\n";
    for (const uint32_t number : {0u, 0u, 1u, crc}) Append(&header, number);
    for (const uint64_t number : {0, 1, 4, 0, 0, 4096, 4100}) {
      Append(&header, number);
    }
    header += "t";
    header.resize(4092);
    Append(&header, Crc32(header.data(), header.size()));
    const std::string lines =
        "qianmo embeddings 1\nversion " + std::to_string(version) + " space " +
        std::to_string(space) +
        "\ntable t dense float32 dim 1 rows 1 default 0 shard_rows 1\n"
        "shard t.rows rows 1 bytes 4100 crc " +
        Hex(crc) + "\n";
    const std::string folder = path_ + "/" + std::to_string(version);
    std::filesystem::create_directory(folder);
    Write(folder + "/t.rows", header + data);
    Write(folder + "/MANIFEST",
          lines + "crc " + Hex(Crc32(lines.data(), lines.size())) + "\n");
  }

  void Publish(int64_t version) const {
    Write(path_ + "/CURRENT", std::to_string(version) + "\n");
  }

 private:
  std::string path_;
};

std::shared_ptr<EmbeddingStore> Open(const std::string& path,
                                     const Accepted& accepted = {0, true}) {
  std::string error;
  auto store = EmbeddingStore::Open(path, accepted, /*verify=*/true, &error);
  if (store == nullptr) std::fprintf(stderr, "%s\n", error.c_str());
  CHECK(store != nullptr);
  return store;
}

// The version that a lookup reads now, checked against its rows; 0 for none.
int64_t Reads(const EmbeddingStore& store) {
  std::string error;
  const auto version = store.Snapshot(&error);
  if (version == nullptr) {
    CHECK(!error.empty());
    return 0;
  }
  const int64_t id = 0;
  float value = 0;
  CHECK(version->table("t")->Gather(&id, 1, nullptr, &value) == 1);
  CHECK(value == static_cast<float>(version->version()));
  return version->version();
}

bool ComesToRead(const EmbeddingStore& store, int64_t version) {
  for (int i = 0; i < 200; ++i) {
    if (Reads(store) == version) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  return false;
}

void GraphsShareWhatIsOpen() {
  const Folder folder;
  folder.Add(1);
  folder.Publish(1);
  const auto one = Open(folder.path());
  CHECK(Open(folder.path() + "/.") == one);
  const auto other = Open(folder.path(), {1, true});
  CHECK(other != one);
  std::string error;
  CHECK(one->Snapshot(&error) == other->Snapshot(&error));
}

void AFileMayNameTheFolder() {
  const Folder folder;
  folder.Add(1);
  folder.Publish(1);
  std::filesystem::create_directory(folder.path() + "/graph");
  const std::string file = folder.path() + "/graph/store";
  for (const std::string& name :
       {std::string("../../") + folder.path().substr(5), folder.path()}) {
    Write(file, name + "\n");
    CHECK(Reads(*Open(file)) == 1);
  }
  std::string error;
  for (const char* text : {"", "\n", "../..", "a\nb\n"}) {
    Write(file, text);
    CHECK(EmbeddingStore::Open(file, {0, true}, false, &error) == nullptr);
    CHECK(error.find(file + ": it should hold one line") == 0);
  }
}

void AcceptedVersionsAreRead() {
  const Folder folder;
  folder.Add(2);
  folder.Add(3);
  folder.Add(5, /*space=*/5);
  folder.Publish(2);
  const auto newest = Open(folder.path());
  const auto falls_back = Open(folder.path(), {1, true});
  const auto refuses = Open(folder.path(), {1, false});
  folder.Publish(5);
  CHECK(ComesToRead(*newest, 5));
  CHECK(ComesToRead(*falls_back, 3));
  CHECK(ComesToRead(*refuses, 0));
  folder.Add(6);  // back to the space, while 5 is published
  folder.Publish(6);
  CHECK(ComesToRead(*refuses, 6));
  folder.Publish(3);
  for (const auto& store : {newest, falls_back, refuses}) {
    CHECK(ComesToRead(*store, 3));
  }
}

void ABrokenVersionLeavesTheOneBefore() {
  const Folder folder;
  folder.Add(1);
  folder.Add(3);
  folder.Publish(1);
  for (const bool fall_back : {true, false}) {
    const auto store = Open(folder.path(), {1, fall_back});
    folder.Publish(2);
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    CHECK(Reads(*store) == 1);
    Write(folder.path() + "/CURRENT", "junk\n");
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    CHECK(Reads(*store) == 1);
    folder.Publish(3);
    CHECK(ComesToRead(*store, 3));
    folder.Publish(1);
    CHECK(ComesToRead(*store, 1));
  }
  std::string error;
  std::filesystem::rename(folder.path() + "/3", folder.path() + "/4");
  folder.Publish(4);
  CHECK(EmbeddingStore::Open(folder.path(), {0, false}, false, &error) ==
        nullptr);
  CHECK(error.find("/4/MANIFEST: it is of version 3") != std::string::npos);
}

void ThreadsReadWhileVersionsChange() {
  const Folder folder;
  folder.Add(1);
  folder.Publish(1);
  const auto store = Open(folder.path());
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&store, &stop, &folder, t] {
      int64_t last = 0;
      while (!stop) {
        const int64_t now = Reads(*store);
        CHECK(now >= last);
        last = now;
        if (t == 0) Open(folder.path());
      }
    });
  }
  for (int64_t version = 2; version < 8; ++version) {
    folder.Add(version);
    folder.Publish(version);
    CHECK(ComesToRead(*store, version));
    std::filesystem::remove_all(folder.path() + "/" +
                                std::to_string(version - 1));
  }
  stop = true;
  for (auto& thread : threads) thread.join();
}

void Run() {
  GraphsShareWhatIsOpen();
  AFileMayNameTheFolder();
  AcceptedVersionsAreRead();
  ABrokenVersionLeavesTheOneBefore();
  ThreadsReadWhileVersionsChange();
}

}  // namespace
}  // namespace qianmo

int main() { qianmo::Run(); }
