// Values of many keys from a Redis or a Redis Cluster, without TensorFlow's
// types.

#ifndef QIANMO_OPS_CC_REDIS_CLIENT_H_
#define QIANMO_OPS_CC_REDIS_CLIENT_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "ops/cc/redis_connection.h"

namespace qianmo {

// SCHEME://[USER@]HOST:PORT[,HOST:PORT...]/PREFIX[?NAME=VALUE[&...]]
//
// SCHEME is redis, redis+cluster, or one of rediss and rediss+cluster for TLS.
// More than one address only of a cluster: any node that answers names the
// others. The password is in the environment, as QIANMO_REDIS_PASSWORD.
//
//   timeout_ms=500     of connecting, and of a request to all nodes
//   on_failure=error   or `default`: what is read of a node that is down
//   ca=FILE            certificates to trust; without it the system's
struct RedisUrl {
  bool cluster = false;
  std::vector<RedisAddress> addresses;
  std::string prefix;
  RedisAccess access;
  std::chrono::milliseconds timeout{500};
  bool fails = true;

  static bool Parse(const std::string& text, RedisUrl* url, std::string* error);
};

// Whether it begins with redis or rediss and looks like a URL.
bool IsRedisUrl(const std::string& path);

// The cluster's hash of bytes, or of more of them after `before`.
uint16_t RedisHash(std::string_view bytes, uint16_t before = 0);

struct RedisKey {
  std::string_view text;  // without braces
  uint16_t hash;          // of the text
};

struct RedisValue {
  static constexpr int64_t kNone = -1, kLost = -2;
  const char* data = nullptr;
  int64_t size = kLost;
};

class RedisClient {
  struct Node;

 public:
  // The values of keys, which lie where they were received.
  class Answers {
   public:
    Answers() = default;
    Answers(Answers&&) = default;
    Answers& operator=(Answers&&) = delete;
    ~Answers();

    std::vector<RedisValue> values;  // one for each key
    std::string error;               // why some of them are lost, if any

   private:
    friend class RedisClient;
    struct Held {
      std::shared_ptr<Node> node;
      std::unique_ptr<RedisConnection> connection;
    };
    std::vector<Held> held_;
  };

  // Connects, or shares the client that this process has for the URL.
  static std::shared_ptr<RedisClient> Open(const std::string& text,
                                           std::string* error);

  const RedisUrl& url() const { return url_; }
  const std::string& name() const { return name_; }  // for messages

  // The values of strings. Asks all nodes at the same time, each of them once;
  // none if `whole` is set and one that has keys is known to be down. Threads
  // may share it.
  Answers Get(const std::vector<RedisKey>& keys, bool whole = false);

  // The same for a command of each key, whose reply is a string; `add` adds the
  // command to a connection, and does so again when it has to be repeated.
  using AddCommand = std::function<void(size_t key, RedisConnection*)>;
  Answers Call(const std::vector<RedisKey>& keys, const AddCommand& add) {
    return Ask(keys, add, /*whole=*/false);
  }

  // The keys of all nodes that match a pattern, some at a time; one that is
  // there all the while comes at least once. False and an error when a node
  // fails, or `take` says so.
  bool Scan(const std::string& pattern,
            const std::function<bool(const std::vector<std::string>&)>& take,
            std::string* error);

  // What each node says of itself. False and an error when one does not.
  bool Info(const std::function<void(std::string_view)>& take,
            std::string* error);

  // Tries again to reach the nodes that are down, and asks a cluster who serves
  // which slots if that seems to have changed. To be called now and then.
  void Maintain();

  void CountLost(int64_t rows) { lost_ += rows; }
  int64_t lost() const { return lost_; }

 private:
  // Its connections that are not in use; a request takes one, or makes one.
  struct Node {
    explicit Node(RedisAddress at) : address(std::move(at)) {}
    const RedisAddress address;
    std::mutex mutex;  // of the below
    std::vector<std::unique_ptr<RedisConnection>> idle;
    std::string fault;  // empty while it is up
    RedisClock::time_point retry_at;
    RedisClock::duration pause{};
  };
  struct Map {
    std::vector<std::shared_ptr<Node>> nodes;
    std::vector<uint16_t>
        of_slot;  // places in `nodes`; empty: always the first
  };
  // Keys to ask one node for.
  struct Batch {
    std::shared_ptr<Node> node;
    bool asking = false;  // the slot is just being moved to it
    bool again = false;   // by a new connection: an old one had been closed
    std::vector<uint32_t> keys;
    std::unique_ptr<RedisConnection> connection;
    bool is_new = false;
  };

  explicit RedisClient(RedisUrl url);

  std::shared_ptr<const Map> map() const;
  std::shared_ptr<Node> NodeAt(const RedisAddress& address);
  // Sets the batch's connection. False and an error when the node is down.
  bool Connect(Batch* batch, RedisClock::time_point until, std::string* error);
  // Whether a node that has keys is known to be down, and why.
  static bool SomeDown(const std::vector<Batch>& batches, std::string* error);
  void MarkDown(Node* node, const std::string& fault);
  Answers Ask(const std::vector<RedisKey>& keys, const AddCommand& add,
              bool whole);
  // Without `add`, they are read.
  void SendKeys(const std::vector<RedisKey>& keys, const AddCommand& add,
                Batch* batch) const;
  // Takes the values from the replies; keys to ask for elsewhere go to `next`.
  void TakeValues(const Batch& batch, bool one_each, std::vector<Batch>* next,
                  Answers* answers);
  // One command to one node. False and an error when it fails.
  bool AskNode(const std::shared_ptr<Node>& node,
               std::initializer_list<std::string_view> command,
               const std::function<bool(const RedisReader&)>& take,
               std::string* error);
  // Where an error reply sends keys to. False when it does not.
  bool Redirected(std::string_view reply, const Node& from,
                  std::shared_ptr<Node>* to, bool* asking);
  bool RefreshMap(std::string* error);
  bool ReadSlots(Node* node, std::string* error);

  const RedisUrl url_;
  std::string name_;
  std::atomic<int64_t> lost_{0};
  std::atomic<bool> map_is_old_{false};
  std::mutex maintaining_;
  mutable std::mutex mutex_;  // of the below
  std::map<RedisAddress, std::shared_ptr<Node>> nodes_;
  std::shared_ptr<const Map> map_;
};

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_REDIS_CLIENT_H_
