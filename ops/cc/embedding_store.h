// Which embedding version is read now: one store for all graphs of a process,
// which follows what is published.

#ifndef QIANMO_OPS_CC_EMBEDDING_STORE_H_
#define QIANMO_OPS_CC_EMBEDDING_STORE_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ops/cc/embedding_table.h"
#include "ops/cc/repeated.h"

namespace qianmo {

// The embedding versions that a graph was made for.
struct Accepted {
  int64_t space = 0;  // 0 for all
  // When CURRENT names a version of another space: read the newest one of this
  // space that is there, or nothing.
  bool fall_back = true;

  bool operator<(const Accepted& other) const {
    return std::tie(space, fall_back) < std::tie(other.space, other.fall_back);
  }
};

// Where embedding versions lie. Used by one thread at a time.
class EmbeddingSource {
 public:
  virtual ~EmbeddingSource() = default;

  // Whether what is published may differ from what was read last.
  virtual bool Changed() = 0;
  // Reads which version is published.
  virtual bool ReadCurrent(int64_t* version, std::string* error) = 0;
  // Those that are there, the newest first.
  virtual std::vector<int64_t> Versions() = 0;
  virtual std::shared_ptr<const EmbeddingVersion> Open(int64_t version,
                                                       std::string* error) = 0;
  // Rows that were answered by a default vector since they could not be had.
  virtual int64_t RowsLost() const { return 0; }
};

// The number that a version is named by; -1 if it is none.
int64_t VersionNumber(const std::string& name);

// A source of embedding versions, opened for those that one graph accepts. A
// thread looks at CURRENT ten times a second. A version that cannot be opened
// leaves the one before in use.
class EmbeddingStore {
 public:
  // Opens the store, or shares one that this process has open. `path` is a
  // folder, as embedding_version.h describes it, the URL of a Redis, as
  // redis_source.h does, or a file whose only line names one of them, a folder
  // from the file's own folder on. With `verify` every byte of a version is
  // read before its first use. Returns null and an error when no accepted
  // version can be opened.
  static std::shared_ptr<EmbeddingStore> Open(const std::string& path,
                                              const Accepted& accepted,
                                              bool verify, std::string* error);
  EmbeddingStore(const EmbeddingStore&) = delete;
  EmbeddingStore& operator=(const EmbeddingStore&) = delete;

  // The version to read: who takes it once for a request reads one version.
  // Null and an error while CURRENT names a version that is not accepted and
  // falling back is off.
  std::shared_ptr<const EmbeddingVersion> Snapshot(std::string* error) const;

  int64_t RowsLost() const { return source_->RowsLost(); }

 private:
  EmbeddingStore(std::string where, const Accepted& accepted,
                 std::unique_ptr<EmbeddingSource> source)
      : where_(std::move(where)),
        accepted_(accepted),
        source_(std::move(source)) {}

  void Follow();
  // Chooses a version; returns an error that is not yet known.
  std::string Refresh();
  // Null and an error when no version can be chosen; `refused` when that is
  // because none is accepted.
  std::shared_ptr<const EmbeddingVersion> Choose(bool* refused,
                                                 std::string* error) const;

  const std::string where_;
  const Accepted accepted_;
  const std::unique_ptr<EmbeddingSource> source_;

  mutable std::mutex mutex_;  // of the two below
  std::shared_ptr<const EmbeddingVersion> current_;
  std::string error_;

  int polls_ = 0;  // since the last try, while there is an error
  std::unique_ptr<Repeated> follower_;  // last, as it uses the others
};

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_EMBEDDING_STORE_H_
