// Which embedding version is read now: one store for all graphs of a process,
// which follows the file CURRENT. The files are described in
// embedding_version.h.

#ifndef QIANMO_OPS_CC_EMBEDDING_STORE_H_
#define QIANMO_OPS_CC_EMBEDDING_STORE_H_

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <tuple>

#include "ops/cc/embedding_version.h"

namespace qianmo {

// The embedding versions that a graph was made for.
struct Accepted {
  int64_t space = 0;  // 0 for all
  // When CURRENT names a version of another space: read the newest one of this
  // space in the folder, or nothing.
  bool fall_back = true;

  bool operator<(const Accepted& other) const {
    return std::tie(space, fall_back) < std::tie(other.space, other.fall_back);
  }
};

// A folder of embedding versions, opened for the versions that one graph
// accepts. A thread looks at CURRENT ten times a second. A version that cannot
// be opened leaves the one before in use.
class EmbeddingStore {
 public:
  // Opens the store, or shares one that this process has open. `path` is the
  // folder, or a file whose only line names it, from the file's own folder on.
  // With `verify` every byte of a version is read before its first use.
  // Returns null and an error when no accepted version can be opened.
  static std::shared_ptr<EmbeddingStore> Open(const std::string& path,
                                              const Accepted& accepted,
                                              bool verify, std::string* error);
  EmbeddingStore(const EmbeddingStore&) = delete;
  EmbeddingStore& operator=(const EmbeddingStore&) = delete;
  ~EmbeddingStore();

  // The version to read: who takes it once for a request reads one version.
  // Null and an error while CURRENT names a version that is not accepted and
  // falling back is off.
  std::shared_ptr<const EmbeddingVersion> Snapshot(std::string* error) const;

 private:
  EmbeddingStore(std::string folder, const Accepted& accepted, bool verify)
      : folder_(std::move(folder)), accepted_(accepted), verify_(verify) {}
  // What tells one file from the next under the same name.
  using FileId = std::tuple<uint64_t, uint64_t, int64_t, int64_t>;

  static FileId IdOf(const std::string& path);
  static std::shared_ptr<const EmbeddingVersion> OpenVersion(
      const std::string& folder, int64_t number, bool verify,
      std::string* error);
  void Follow();
  void Refresh();
  // Null and an error when no version can be chosen; `refused` when that is
  // because none is accepted.
  std::shared_ptr<const EmbeddingVersion> Choose(bool* refused,
                                                 std::string* error) const;

  const std::string folder_;
  const Accepted accepted_;
  const bool verify_;
  FileId seen_;  // CURRENT as it was last read; of the thread below

  mutable std::mutex mutex_;  // of the two below
  std::shared_ptr<const EmbeddingVersion> current_;
  std::string error_;

  std::mutex stop_mutex_;
  std::condition_variable stopped_;
  bool stop_ = false;
  std::thread follower_;
};

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_EMBEDDING_STORE_H_
