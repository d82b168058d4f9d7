#include "ops/cc/embedding_store.h"

#include <dirent.h>
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <utility>
#include <vector>

namespace qianmo {
namespace {

constexpr auto kPoll = std::chrono::milliseconds(100);
constexpr int kPollsBeforeRetry = 50;

bool IsFolder(const std::string& path) {
  struct stat info;
  return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

// The only line of a short file.
bool ReadLine(const std::string& path, std::string* line, std::string* error) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    *error = path + ": there is no such file";
    return false;
  }
  char text[4096];
  file.read(text, sizeof(text));
  line->assign(text, static_cast<size_t>(file.gcount()));
  const size_t end = line->find('\n');
  if (!file.eof() || end == std::string::npos || end == 0 ||
      end + 1 != line->size()) {
    *error = path + ": it should hold one line. Received: " +
             std::to_string(line->size()) + " bytes";
    return false;
  }
  line->resize(end);
  return true;
}

// The number that a version's folder is named by; -1 if it is none.
int64_t VersionOf(const std::string& name) {
  if (name.empty() || name.size() > 18 || name[0] == '0') return -1;
  if (!std::all_of(name.begin(), name.end(),
                   [](char c) { return c >= '0' && c <= '9'; })) {
    return -1;
  }
  return std::atoll(name.c_str());
}

// The versions in a folder, the newest first.
std::vector<int64_t> VersionsIn(const std::string& folder) {
  std::vector<int64_t> found;
  if (DIR* const listing = opendir(folder.c_str())) {
    while (const dirent* const entry = readdir(listing)) {
      const int64_t version = VersionOf(entry->d_name);
      if (version > 0) found.push_back(version);
    }
    closedir(listing);
  }
  std::sort(found.rbegin(), found.rend());
  return found;
}

}  // namespace

EmbeddingStore::FileId EmbeddingStore::IdOf(const std::string& path) {
  struct stat info;
  if (stat(path.c_str(), &info) != 0) return FileId{};
  return FileId{info.st_dev, info.st_ino, info.st_mtim.tv_sec,
                info.st_mtim.tv_nsec};
}

// Graphs share opened versions, also those that accept different ones.
std::shared_ptr<const EmbeddingVersion> EmbeddingStore::OpenVersion(
    const std::string& folder, int64_t number, bool verify,
    std::string* error) {
  struct Opened {
    std::weak_ptr<const EmbeddingVersion> version;
    bool verified = false;
  };
  static std::mutex* const mutex = new std::mutex;
  static auto* const all = new std::map<FileId, Opened>;
  const std::string path = folder + "/" + std::to_string(number);
  const FileId id = IdOf(path + "/MANIFEST");
  std::lock_guard<std::mutex> lock(*mutex);
  Opened opened = (*all)[id];
  all->erase(id);
  auto version = opened.version.lock();
  if (version == nullptr) {
    version = EmbeddingVersion::Open(path, error);
    if (version == nullptr) return nullptr;
    opened = {version, false};
  }
  if (version->version() != number) {
    *error = path + "/MANIFEST: it is of version " +
             std::to_string(version->version()) + ", not of this folder's";
    return nullptr;
  }
  if (verify && !opened.verified) {
    if (!version->Verify(error)) return nullptr;
    opened.verified = true;
  }
  (*all)[id] = opened;
  return version;
}

std::shared_ptr<EmbeddingStore> EmbeddingStore::Open(const std::string& path,
                                                     const Accepted& accepted,
                                                     bool verify,
                                                     std::string* error) {
  std::string folder = path;
  if (!IsFolder(path)) {
    std::string line;
    if (!ReadLine(path, &line, error)) return nullptr;
    const size_t slash = path.rfind('/');
    const bool relative = line[0] != '/' && slash != std::string::npos;
    folder = relative ? path.substr(0, slash + 1) + line : line;
  }
  char* const real = realpath(folder.c_str(), nullptr);
  if (real == nullptr || !IsFolder(real)) {
    std::free(real);
    *error = folder + ": there is no such folder of embeddings" +
             (folder == path ? "" : ", which " + path + " names");
    return nullptr;
  }
  folder = real;
  std::free(real);

  using Key = std::tuple<std::string, Accepted, bool>;
  static std::mutex* const mutex = new std::mutex;
  static auto* const stores = new std::map<Key, std::weak_ptr<EmbeddingStore>>;
  std::lock_guard<std::mutex> lock(*mutex);
  auto& known = (*stores)[Key(folder, accepted, verify)];
  auto store = known.lock();
  if (store != nullptr && store->Snapshot(error) != nullptr) return store;
  store.reset(new EmbeddingStore(folder, accepted, verify));
  store->Refresh();
  if (store->Snapshot(error) == nullptr) return nullptr;
  store->follower_ = std::thread(&EmbeddingStore::Follow, store.get());
  known = store;
  return store;
}

EmbeddingStore::~EmbeddingStore() {
  {
    std::lock_guard<std::mutex> lock(stop_mutex_);
    stop_ = true;
  }
  stopped_.notify_all();
  if (follower_.joinable()) follower_.join();
}

std::shared_ptr<const EmbeddingVersion> EmbeddingStore::Snapshot(
    std::string* error) const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (current_ == nullptr) *error = error_;
  return current_;
}

void EmbeddingStore::Follow() {
  int polls = 0;
  std::unique_lock<std::mutex> lock(stop_mutex_);
  while (!stopped_.wait_for(lock, kPoll, [this] { return stop_; })) {
    lock.unlock();
    bool failed;
    {
      std::lock_guard<std::mutex> state(mutex_);
      failed = !error_.empty();
    }
    polls = failed ? polls + 1 : 0;
    if (IdOf(folder_ + "/CURRENT") != seen_ || polls >= kPollsBeforeRetry) {
      Refresh();
      polls = 0;
    }
    lock.lock();
  }
}

void EmbeddingStore::Refresh() {
  seen_ = IdOf(folder_ + "/CURRENT");
  bool refused = false;
  std::string error;
  auto chosen = Choose(&refused, &error);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    error_.swap(error);
    // The one before goes out of use here, and is unmapped below if no request
    // still reads it. A version that cannot be opened leaves it in use.
    if (chosen != nullptr || refused) current_.swap(chosen);
    if (error_.empty() || error_ == error) return;
    error = error_;
  }
  std::fprintf(stderr, "qianmo: %s\n", error.c_str());
}

std::shared_ptr<const EmbeddingVersion> EmbeddingStore::Choose(
    bool* refused, std::string* error) const {
  std::string line;
  if (!ReadLine(folder_ + "/CURRENT", &line, error)) return nullptr;
  const int64_t named = VersionOf(line);
  if (named < 0) {
    *error = folder_ + "/CURRENT: it should hold a version's number";
    return nullptr;
  }
  const auto accepts = [this](const EmbeddingVersion& version) {
    return accepted_.space == 0 || accepted_.space == version.space();
  };
  auto opened = OpenVersion(folder_, named, verify_, error);
  if (opened == nullptr || accepts(*opened)) return opened;
  std::string what =
      folder_ + ": the graph accepts embedding versions of space " +
      std::to_string(accepted_.space) + ", and CURRENT names " +
      std::to_string(named) + " of space " + std::to_string(opened->space());
  if (accepted_.fall_back) {
    for (const int64_t version : VersionsIn(folder_)) {
      std::string ignored;
      opened = OpenVersion(folder_, version, verify_, &ignored);
      if (opened != nullptr && accepts(*opened)) return opened;
    }
    what += "; no version in the folder is of that space";
  }
  *refused = !accepted_.fall_back;
  *error = what;
  return nullptr;
}

}  // namespace qianmo
