// One connection to one Redis, without TensorFlow's types.
//
// The protocol (RESP 2) is written here and not taken from hiredis: rows are
// then read where they were received, without an object for each of them; TLS
// works where Debian's hiredis has none; and the library loads on every
// machine, also linked into a server, whatever is installed there.

#ifndef QIANMO_OPS_CC_REDIS_CONNECTION_H_
#define QIANMO_OPS_CC_REDIS_CONNECTION_H_

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "ops/cc/redis_tls.h"

namespace qianmo {

using RedisClock = std::chrono::steady_clock;

struct RedisAddress {
  std::string host;
  int port = 0;

  bool operator<(const RedisAddress& other) const {
    return std::tie(host, port) < std::tie(other.host, other.port);
  }
  std::string Text() const { return host + ":" + std::to_string(port); }
};

// How to be let in.
struct RedisAccess {
  std::string user, password;  // none where empty
  bool tls = false;
  std::string ca;  // file of certificates to trust; the system's where empty
};

// A part of a reply. An array is followed by its parts.
struct RedisPart {
  char type;       // as on the wire: + - : $ *
  int64_t number;  // of ':'; parts of '*' or bytes of the others, -1 for nil
  size_t at;       // where the bytes begin
};

// Replies as they arrive, cut into parts.
class RedisReader {
 public:
  // Forgets all, and awaits that many replies.
  void Expect(size_t replies);
  // Where up to `*size` bytes, at least one, may be put.
  char* Room(size_t* size);
  // Takes what was put there. False and an error when it is no reply.
  bool Take(size_t size, std::string* error);
  bool whole() const { return awaited_ == 0; }

  const std::vector<RedisPart>& parts() const { return parts_; }
  // The bytes of a part, none where its number does not count bytes.
  std::string_view text(const RedisPart& part) const {
    const bool has_bytes =
        part.number >= 0 && part.type != ':' && part.type != '*';
    return {buffer_.data() + part.at,
            has_bytes ? static_cast<size_t>(part.number) : 0};
  }

 private:
  std::vector<char> buffer_;
  size_t read_ = 0, end_ = 0;
  size_t awaited_ = 0;  // parts
  std::vector<RedisPart> parts_;
};

class RedisConnection {
 public:
  // Connects and is let in. Returns null and an error when that fails.
  static std::unique_ptr<RedisConnection> Open(const RedisAddress& address,
                                               const RedisAccess& access,
                                               RedisClock::time_point until,
                                               std::string* error);
  RedisConnection(const RedisConnection&) = delete;
  RedisConnection& operator=(const RedisConnection&) = delete;
  ~RedisConnection();

  // Adds a command of `count` words, which `AddWord` adds, to the next
  // exchange.
  void AddCommand(size_t count);
  void AddWord(std::string_view word);
  void Add(std::initializer_list<std::string_view> command);

  // Sends the commands of all connections and reads the replies, side by side.
  // One of them may fail, see `error`, and is of no use then.
  static void Exchange(const std::vector<RedisConnection*>& connections,
                       RedisClock::time_point until);
  const std::string& error() const { return error_; }  // empty when all is well
  bool is_late() const { return late_; }  // the fault is that time was up
  const RedisReader& replies() const { return reader_; }

 private:
  RedisConnection() = default;

  bool Connect(const RedisAddress& address, RedisClock::time_point until,
               std::string* error);
  bool StartTls(const RedisAddress& address, const RedisAccess& access,
                RedisClock::time_point until, std::string* error);
  void Begin();
  bool is_busy() const { return error_.empty() && !reader_.whole(); }
  // Both do what can be done without waiting.
  void Send();
  void Receive();

  int socket_ = -1;
  std::unique_ptr<RedisTls> tls_;
  std::string commands_;  // of the next exchange
  size_t num_commands_ = 0;
  std::string sending_;  // what is on its way
  size_t sent_ = 0;
  RedisReader reader_;
  std::string error_;
  bool late_ = false;
};

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_REDIS_CONNECTION_H_
