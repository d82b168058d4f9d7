#include "ops/cc/embedding_store.h"

#include <dirent.h>
#include <sys/stat.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>

#include "ops/cc/embedding_version.h"
#include "ops/cc/redis_client.h"
#include "ops/cc/redis_source.h"

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

// The versions in a folder, the newest first.
std::vector<int64_t> VersionsIn(const std::string& folder) {
  std::vector<int64_t> found;
  if (DIR* const listing = opendir(folder.c_str())) {
    while (const dirent* const entry = readdir(listing)) {
      const int64_t version = VersionNumber(entry->d_name);
      if (version > 0) found.push_back(version);
    }
    closedir(listing);
  }
  std::sort(found.rbegin(), found.rend());
  return found;
}

// What tells one file from the next under the same name.
using FileId = std::tuple<uint64_t, uint64_t, int64_t, int64_t>;

FileId IdOf(const std::string& path) {
  struct stat info;
  if (stat(path.c_str(), &info) != 0) return FileId{};
  return FileId{info.st_dev, info.st_ino, info.st_mtim.tv_sec,
                info.st_mtim.tv_nsec};
}

class Folder : public EmbeddingSource {
 public:
  Folder(std::string path, bool verify)
      : path_(std::move(path)), verify_(verify) {}

  bool Changed() override { return IdOf(path_ + "/CURRENT") != seen_; }

  bool ReadCurrent(int64_t* version, std::string* error) override {
    seen_ = IdOf(path_ + "/CURRENT");
    std::string line;
    if (!ReadLine(path_ + "/CURRENT", &line, error)) return false;
    *version = VersionNumber(line);
    if (*version < 0) {
      *error = path_ + "/CURRENT: it should hold a version's number";
    }
    return *version >= 0;
  }

  std::vector<int64_t> Versions() override { return VersionsIn(path_); }

  // Graphs share opened versions, also those that accept different ones.
  std::shared_ptr<const EmbeddingVersion> Open(int64_t number,
                                               std::string* error) override {
    struct Opened {
      std::weak_ptr<const MappedVersion> version;
      bool verified = false;
    };
    static std::mutex* const mutex = new std::mutex;
    static auto* const all = new std::map<FileId, Opened>;
    const std::string path = path_ + "/" + std::to_string(number);
    const FileId id = IdOf(path + "/MANIFEST");
    std::lock_guard<std::mutex> lock(*mutex);
    Opened opened = (*all)[id];
    all->erase(id);
    auto version = opened.version.lock();
    if (version == nullptr) {
      version = MappedVersion::Open(path, error);
      if (version == nullptr) return nullptr;
      opened = {version, false};
    }
    if (version->version() != number) {
      *error = path + "/MANIFEST: it is of version " +
               std::to_string(version->version()) + ", not of this folder's";
      return nullptr;
    }
    if (verify_ && !opened.verified) {
      if (!version->Verify(error)) return nullptr;
      opened.verified = true;
    }
    (*all)[id] = opened;
    return version;
  }

 private:
  const std::string path_;
  const bool verify_;
  FileId seen_;  // CURRENT as it was last read
};

// The folder or URL that `path` is, or that the file there names.
bool Resolve(const std::string& path, std::string* where, std::string* error) {
  *where = path;
  if (!IsRedisUrl(path) && !IsFolder(path)) {
    std::string line;
    if (!ReadLine(path, &line, error)) return false;
    const size_t slash = path.rfind('/');
    const bool relative = line[0] != '/' && slash != std::string::npos;
    *where =
        relative && !IsRedisUrl(line) ? path.substr(0, slash + 1) + line : line;
  }
  if (IsRedisUrl(*where)) return true;
  char* const real = realpath(where->c_str(), nullptr);
  if (real == nullptr || !IsFolder(real)) {
    std::free(real);
    *error = *where + ": there is no such folder of embeddings" +
             (*where == path ? "" : ", which " + path + " names");
    return false;
  }
  *where = real;
  std::free(real);
  return true;
}

void Say(const std::string& fault) {
  if (!fault.empty()) std::fprintf(stderr, "qianmo: %s\n", fault.c_str());
}

}  // namespace

int64_t VersionNumber(const std::string& name) {
  if (name.empty() || name.size() > 18 || name[0] == '0') return -1;
  if (!std::all_of(name.begin(), name.end(),
                   [](char c) { return c >= '0' && c <= '9'; })) {
    return -1;
  }
  return std::atoll(name.c_str());
}

std::shared_ptr<EmbeddingStore> EmbeddingStore::Open(const std::string& path,
                                                     const Accepted& accepted,
                                                     bool verify,
                                                     std::string* error) {
  std::string where;
  if (!Resolve(path, &where, error)) return nullptr;
  using Key = std::tuple<std::string, Accepted, bool>;
  static std::mutex* const mutex = new std::mutex;
  static auto* const stores = new std::map<Key, std::weak_ptr<EmbeddingStore>>;
  std::lock_guard<std::mutex> lock(*mutex);
  auto& known = (*stores)[Key(where, accepted, verify)];
  auto store = known.lock();
  if (store != nullptr && store->Snapshot(error) != nullptr) return store;
  std::unique_ptr<EmbeddingSource> source;
  if (IsRedisUrl(where)) {
    source = OpenRedis(where, verify, error);
    if (source == nullptr) return nullptr;
  } else {
    source = std::make_unique<Folder>(where, verify);
  }
  store.reset(new EmbeddingStore(where, accepted, std::move(source)));
  const std::string fault = store->Refresh();
  if (store->Snapshot(error) == nullptr) return nullptr;
  Say(fault);
  store->follower_ = std::make_unique<Repeated>(
      kPoll, [opened = store.get()] { opened->Follow(); });
  known = store;
  return store;
}

std::shared_ptr<const EmbeddingVersion> EmbeddingStore::Snapshot(
    std::string* error) const {
  std::lock_guard<std::mutex> lock(mutex_);
  if (current_ == nullptr) *error = error_;
  return current_;
}

void EmbeddingStore::Follow() {
  bool failed;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    failed = !error_.empty();
  }
  polls_ = failed ? polls_ + 1 : 0;
  if (source_->Changed() || polls_ >= kPollsBeforeRetry) {
    Say(Refresh());
    polls_ = 0;
  }
}

std::string EmbeddingStore::Refresh() {
  bool refused = false;
  std::string error;
  auto chosen = Choose(&refused, &error);
  std::lock_guard<std::mutex> lock(mutex_);
  error_.swap(error);
  // The one before goes out of use here, and is unmapped at the end if no
  // request still reads it. A version that cannot be opened leaves it in use.
  if (chosen != nullptr || refused) current_.swap(chosen);
  return error_ == error ? "" : error_;
}

std::shared_ptr<const EmbeddingVersion> EmbeddingStore::Choose(
    bool* refused, std::string* error) const {
  int64_t named;
  if (!source_->ReadCurrent(&named, error)) return nullptr;
  const auto accepts = [this](const EmbeddingVersion& version) {
    return accepted_.space == 0 || accepted_.space == version.space();
  };
  auto opened = source_->Open(named, error);
  if (opened == nullptr || accepts(*opened)) return opened;
  std::string what =
      where_ + ": the graph accepts embedding versions of space " +
      std::to_string(accepted_.space) + ", and CURRENT names " +
      std::to_string(named) + " of space " + std::to_string(opened->space());
  if (accepted_.fall_back) {
    for (const int64_t version : source_->Versions()) {
      std::string ignored;
      opened = source_->Open(version, &ignored);
      if (opened != nullptr && accepts(*opened)) return opened;
    }
    what += "; no version there is of that space";
  }
  *refused = !accepted_.fall_back;
  *error = what;
  return nullptr;
}

}  // namespace qianmo
