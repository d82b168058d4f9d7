// The support store in a Redis or a Redis Cluster, for all servers that name
// it.
//
// Of prefix P, rows of 64 numbers with 3 labels:
//
//   P:v2:64x3:42   the rows of task 42, one behind the other, oldest first
//
// Rows are those of support_row.h; v2 is their format. Each write is a script
// of one key, which Redis runs alone: it puts rows where they belong, lets go
// of those past their time, and sets when the key expires. Stores of another
// dim or num_labels have other keys. All that share a key should name the same
// max_rows: one of fewer trims a task when it writes.

#ifndef QIANMO_OPS_CC_REDIS_SUPPORT_H_
#define QIANMO_OPS_CC_REDIS_SUPPORT_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ops/cc/redis_client.h"
#include "ops/cc/repeated.h"
#include "ops/cc/support_store.h"

namespace qianmo {

class RedisSupport : public SupportStore {
 public:
  // Returns null and an error when the Redis does not answer.
  static std::unique_ptr<RedisSupport> Open(const SupportOptions& options,
                                            std::string* error);

  bool is_remote() const override { return true; }
  void SetLimits(const SupportLimits& limits) override {
    ttl_micros_ = limits.ttl_micros;
  }
  void Put(const SupportBatch& rows, int32_t* status) override;
  void Get(const int64_t* tasks, size_t num_tasks, int64_t version,
           const SupportRoom& room) override;
  // Tasks, bytes and evicted tasks are those of the whole Redis.
  SupportStats Stats() override;
  void Flush() override {}
  bool Export(const std::string& path, std::string* error) override;
  bool Import(const std::string& path, std::string* error) override;

 private:
  struct Row {
    int64_t task;
    const char* bytes;
    int32_t status;
  };

  RedisSupport(const SupportOptions& options,
               std::shared_ptr<RedisClient> client);
  int64_t ExpiredUntil() const;
  // Stores rows of tasks that stand together, and sets the status of each.
  // Returns why some were not stored, if any.
  std::string Write(Row* rows, size_t num_rows);
  bool AppendTasks(const std::string* keys, size_t num_keys,
                   std::vector<char>* records, std::string* error);

  const std::shared_ptr<RedisClient> client_;
  const std::string keys_;  // what they begin with
  const uint16_t keys_hash_;
  const size_t row_bytes_;
  const size_t tasks_at_once_;  // to read in a round trip
  std::atomic<int64_t> ttl_micros_;
  std::atomic<int64_t> hits_{0}, misses_{0}, refused_{0};
  std::atomic<int64_t> write_errors_{0}, read_errors_{0};
  Repeated maintenance_;
};

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_REDIS_SUPPORT_H_
