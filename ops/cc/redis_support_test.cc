#include "ops/cc/redis_support.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ops/cc/check.h"
#include "ops/cc/support_log.h"

namespace qianmo {
namespace {

constexpr SupportShape kShape = {3, 2, 4};
constexpr int64_t kSecond = 1'000'000;
constexpr int64_t kNow = 1000 * kSecond;

using Words = std::vector<std::string>;

std::string Bulk(const std::string& text) {
  return "$" + std::to_string(text.size()) + "\r\n" + text + "\r\n";
}

// Answers as it is told to, one connection after another by one thread.
class FakeRedis {
 public:
  explicit FakeRedis(std::function<std::string(const Words&)> answer)
      : answer_(std::move(answer)) {
    listening_ = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    auto* const any = reinterpret_cast<sockaddr*>(&address);
    CHECK(bind(listening_, any, size) == 0 && listen(listening_, 8) == 0);
    CHECK(getsockname(listening_, any, &size) == 0);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this] { Serve(); });
  }
  ~FakeRedis() {
    stop_ = true;
    thread_.join();
  }

  std::string url() const {
    return "redis://127.0.0.1:" + std::to_string(port_) + "/p";
  }
  std::vector<Words> Commands() {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(commands_, {});
  }

 private:
  void Serve() {
    struct Client {
      int socket;
      std::string received;
    };
    std::vector<Client> clients;
    while (!stop_) {
      std::vector<pollfd> sockets = {{listening_, POLLIN, 0}};
      for (const Client& client : clients) {
        sockets.push_back({client.socket, POLLIN, 0});
      }
      if (poll(sockets.data(), sockets.size(), 5) <= 0) continue;
      for (size_t i = clients.size(); i > 0; --i) {
        if (sockets[i].revents == 0) continue;
        char bytes[4096];
        Client& client = clients[i - 1];
        const ssize_t n = recv(client.socket, bytes, sizeof(bytes), 0);
        if (n <= 0) {
          close(client.socket);
          clients.erase(clients.begin() + static_cast<ptrdiff_t>(i) - 1);
          continue;
        }
        client.received.append(bytes, static_cast<size_t>(n));
        Words words;
        while (Take(&client.received, &words)) {
          {
            std::lock_guard<std::mutex> lock(mutex_);
            commands_.push_back(words);
          }
          const std::string reply = answer_(words);
          CHECK(send(client.socket, reply.data(), reply.size(), MSG_NOSIGNAL) ==
                static_cast<ssize_t>(reply.size()));
        }
      }
      if (sockets[0].revents != 0) {
        clients.push_back({accept(listening_, nullptr, nullptr), ""});
      }
    }
    for (const Client& client : clients) close(client.socket);
    close(listening_);
  }

  // Takes a whole command off what was received.
  static bool Take(std::string* received, Words* words) {
    words->clear();
    size_t at = 0;
    const auto number = [&](char type) {
      const size_t end = received->find("\r\n", at);
      if (end == std::string::npos) return -1L;
      CHECK((*received)[at] == type);
      const long value = std::stol(received->substr(at + 1));
      at = end + 2;
      return value;
    };
    const long count = number('*');
    for (long i = 0; i < count; ++i) {
      const long size = number('$');
      if (size < 0 || received->size() < at + static_cast<size_t>(size) + 2) {
        return false;
      }
      words->push_back(received->substr(at, static_cast<size_t>(size)));
      at += static_cast<size_t>(size) + 2;
    }
    if (count >= 0) received->erase(0, at);
    return count >= 0;
  }

  const std::function<std::string(const Words&)> answer_;
  int listening_, port_;
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::vector<Words> commands_;
  std::thread thread_;
};

SupportOptions Options(const std::string& url) {
  SupportOptions options;
  options.shape = kShape;
  options.path = url;
  options.clock = [] { return kNow; };
  return options;
}

std::unique_ptr<SupportStore> Open(const SupportOptions& options) {
  std::string error;
  auto store = SupportStore::Open(options, &error);
  if (!store) std::fprintf(stderr, "%s\n", error.c_str());
  CHECK(store);
  return store;
}

std::string Row(int64_t time, int64_t version, int64_t written) {
  const float h[] = {1, 2, static_cast<float>(time)}, labels[] = {0, 1};
  std::string row(kShape.row_bytes(), 'x');
  CHECK(PackRow(kShape, h, labels, labels, time, 0, version, row.data()) == 0);
  std::memcpy(row.data() + offsetof(RowHead, written), &written, 8);
  return row;
}

std::vector<int32_t> Put(SupportStore* store, const std::vector<int64_t>& tasks,
                         const std::vector<int64_t>& times) {
  const size_t n = tasks.size();
  const std::vector<float> h(n * 3, 7), labels(n * 2, 1);
  const std::vector<int64_t> versions(n, 5);
  std::vector<int32_t> status(n, -1);
  store->Put({n, tasks.data(), h.data(), labels.data(), labels.data(),
              times.data(), times.data(), versions.data()},
             status.data());
  return status;
}

// Times of what is found; the vectors are looked at.
std::vector<std::vector<int64_t>> Get(SupportStore* store,
                                      const std::vector<int64_t>& tasks,
                                      int32_t max_rows = 4) {
  const size_t n = tasks.size() * static_cast<size_t>(max_rows);
  std::vector<float> h(n * 3), labels(n * 2), weights(n * 2);
  std::vector<int64_t> time(n), event(n);
  std::vector<int32_t> count(tasks.size());
  store->Get(tasks.data(), tasks.size(), 5,
             {max_rows, h.data(), labels.data(), weights.data(), time.data(),
              event.data(), count.data()});
  std::vector<std::vector<int64_t>> found;
  for (size_t i = 0; i < tasks.size(); ++i) {
    const size_t first = i * static_cast<size_t>(max_rows);
    found.emplace_back(time.begin() + static_cast<ptrdiff_t>(first),
                       time.begin() + static_cast<ptrdiff_t>(first) + count[i]);
    for (size_t j = 0; j < found.back().size(); ++j) {
      CHECK(h[(first + j) * 3 + 2] == static_cast<float>(time[first + j]));
      CHECK(labels[(first + j) * 2 + 1] == 1 && weights[(first + j) * 2] == 0);
    }
  }
  return found;
}

void WhatCannotBeOpened() {
  std::string error;
  CHECK(!SupportStore::Open(Options("redis://127.0.0.1:1/p"), &error));
  CHECK(error.find("Connection refused") != std::string::npos);
  CHECK(!SupportStore::Open(Options("redis://127.0.0.1/p"), &error));
  CHECK(error.find("each address should be") != std::string::npos);
  CHECK(!SupportStore::Open(Options("redis://a:1/p?on_failure=error"), &error));
  CHECK(error.find("is for embeddings") != std::string::npos);
  auto options = Options("redis://127.0.0.1:1/p");
  options.limits.max_tasks = 3;
  CHECK(!SupportStore::Open(options, &error));
  CHECK(error.find("`maxmemory`") != std::string::npos);
}

void RowsAreReadAndBadValuesAreNot() {
  const int64_t old = kNow - 10 * kSecond;
  const std::string good = Row(3, 5, kNow) + Row(4, 6, kNow) + Row(5, 5, kNow);
  FakeRedis redis([&](const Words& words) -> std::string {
    if (words[0] == "INFO") return "-NOPERM\r\n";
    CHECK(words[0] == "MGET");
    std::string reply = "*" + std::to_string(words.size() - 1) + "\r\n";
    for (size_t i = 1; i < words.size(); ++i) {
      if (words[i] == "p:v2:3x2:1") {
        reply += Bulk(good);
      } else if (words[i] == "p:v2:3x2:-2") {
        reply += Bulk(Row(2, 5, old) + Row(9, 5, kNow));
      } else if (words[i] == "p:v2:3x2:3") {
        reply += Bulk(good.substr(1));
      } else if (words[i] == "p:v2:3x2:4") {
        reply += "-ERR no\r\n";
      } else if (words[i] == "p:v2:3x2:5") {
        reply += Bulk("");
      } else {
        reply += "$-1\r\n";
      }
    }
    return reply;
  });
  auto options = Options(redis.url());
  options.limits.ttl_micros = 10 * kSecond;
  const auto store = Open(options);
  redis.Commands();
  const auto found = Get(store.get(), {1, -2, 3, 4, 5, 6, 1});
  CHECK((found == std::vector<std::vector<int64_t>>{
                      {3, 5}, {9}, {}, {}, {}, {}, {3, 5}}));
  CHECK(redis.Commands().size() == 1);  // one round trip
  CHECK((Get(store.get(), {1}, 1) == std::vector<std::vector<int64_t>>{{5}}));
  std::vector<int64_t> many(3000, 6);
  many[2999] = 1;
  CHECK(Get(store.get(), many)[2999].size() == 2);
  CHECK(Get(store.get(), {}).empty());
  store->SetLimits({});
  CHECK(Get(store.get(), {-2})[0].size() == 2);
  const SupportStats stats = store->Stats();
  CHECK(stats.hits == 6 && stats.misses == 2 + 2999);
  CHECK(stats.refused == 4 && stats.read_errors == 2);
}

void LargeTasksAreReadFewAtATime() {
  FakeRedis redis([](const Words& words) -> std::string {
    std::string reply = "*" + std::to_string(words.size() - 1) + "\r\n";
    for (size_t i = 1; i < words.size(); ++i) reply += "$-1\r\n";
    return reply;
  });
  auto options = Options(redis.url());
  options.shape.max_rows = 4096;
  const auto store = Open(options);
  redis.Commands();
  const size_t most = (8 << 20) / (4096 * kShape.row_bytes());
  Get(store.get(), std::vector<int64_t>(2 * most + 1, 6));
  const auto commands = redis.Commands();
  CHECK(commands.size() == 3);
  CHECK(commands[0].size() == 1 + most && commands[2].size() == 2);
}

// As one node of a cluster says, though the URL names no cluster.
void TasksThatMoveAreAskedFor() {
  const std::string row = Row(3, 5, kNow);
  bool asking = false;
  FakeRedis to([&](const Words& words) -> std::string {
    if (words[0] == "ASKING") {
      asking = true;
      return "+OK\r\n";
    }
    CHECK(std::exchange(asking, false));
    return "*1\r\n" + Bulk(row);
  });
  const std::string url = to.url();
  const size_t begin = url.find("//") + 2, end = url.rfind('/');
  const std::string ask = "-ASK 7 " + url.substr(begin, end - begin) + "\r\n";
  FakeRedis from([&](const Words&) { return ask; });
  const auto store = Open(Options(from.url()));
  CHECK((Get(store.get(), {1}) == std::vector<std::vector<int64_t>>{{3}}));
}

void RowsArePutTaskByTask() {
  FakeRedis redis([&](const Words& words) -> std::string {
    if (words[0] == "INFO") return "-NOPERM\r\n";
    if (words[0] == "MGET") return "*1\r\n$-1\r\n";
    CHECK(words[0] == "EVAL" && words[2] == "1");
    const std::string& key = words[3];
    if (key == "p:v2:3x2:8") return "-OOM command not allowed\r\n";
    if (key == "p:v2:3x2:9") return Bulk("more than there are");
    std::string status(words.size() - 8, '\0');
    if (key == "p:v2:3x2:7") status[1] = kTooOld;
    return Bulk(status);
  });
  auto options = Options(redis.url());
  options.limits.ttl_micros = 10 * kSecond;
  const auto store = Open(options);
  redis.Commands();
  CHECK((Put(store.get(), {9, 7, 8, 7, 6, 7}, {1, 5, 1, 2, -1, 3}) ==
         std::vector<int32_t>{kUnreachable, 0, kUnreachable, kTooOld, kBadTime,
                              0}));
  const auto commands = redis.Commands();
  CHECK(commands.size() == 3);
  const Words& seven = commands[0];
  CHECK(seven.size() == 11 && seven[3] == "p:v2:3x2:7");
  CHECK(seven[4] == std::to_string(kShape.row_bytes()) && seven[5] == "4");
  CHECK(seven[6] == std::to_string(10 * kSecond));
  CHECK(seven[7] == std::to_string(kNow));
  for (size_t i = 0; i < 3; ++i) {
    RowHead head;
    std::memcpy(&head, seven[8 + i].data(), sizeof(head));
    const int64_t times[] = {5, 2, 3};  // in the order in which they came
    CHECK(head.time == times[i] && head.version == 5 && head.written == kNow);
  }
  CHECK(store->Stats().write_errors == 2);
  CHECK(Put(store.get(), {}, {}).empty());
  // More than one round trip takes.
  const std::vector<int64_t> tasks(2500, 7), times(2500, 1);
  const auto status = Put(store.get(), tasks, times);
  for (size_t i = 0; i < status.size(); ++i) {
    CHECK(status[i] == (i % 256 == 1 ? kTooOld : kStored));
  }
}

// The system's clock is asked when the store opens, and not again.
void AClockThatIsSetChangesNothing() {
  FakeRedis redis([&](const Words& words) -> std::string {
    if (words[0] == "MGET") return "*1\r\n$-1\r\n";
    return Bulk(std::string(words.size() - 8, '\0'));
  });
  static std::atomic<int64_t> wall{kNow}, steady{7};
  auto options = Options(redis.url());
  options.clock = [] { return wall.load(); };
  options.steady = [] { return steady.load(); };
  const auto store = Open(options);
  redis.Commands();
  wall += 3600 * kSecond;
  steady += kSecond;
  Put(store.get(), {1}, {1});
  const Words put = redis.Commands()[0];
  RowHead head;
  std::memcpy(&head, put[8].data(), sizeof(head));
  CHECK(head.written == kNow + kSecond);
  CHECK(put[7] == std::to_string(kNow + kSecond));
}

void ExportsAreThoseOfALocalStore() {
  const std::string rows = Row(3, 5, kNow - 1) + Row(4, 5, kNow);
  std::string second_page = Bulk("0") + "*2\r\n" + Bulk("p:v2:3x2:-7") +
                            Bulk("p:v2:3x2:8");  // the latter is gone by then
  FakeRedis redis([&](const Words& words) -> std::string {
    if (words[0] == "SCAN") {
      CHECK(words[2] == "MATCH" && words[3] == "p:v2:3x2:*");
      return "*2\r\n" + (words[1] == "0"
                             ? Bulk("12") + "*1\r\n" + Bulk("p:v2:3x2:2")
                             : second_page);
    }
    if (words[0] == "EVAL") return Bulk(std::string(words.size() - 8, '\0'));
    std::string reply = "*" + std::to_string(words.size() - 1) + "\r\n";
    for (size_t i = 1; i < words.size(); ++i) {
      reply += words[i] == "p:v2:3x2:8" ? "$-1\r\n" : Bulk(rows);
    }
    return reply;
  });
  char made[] = "/tmp/redis_support_XXXXXX";
  CHECK(mkdtemp(made) != nullptr);
  const std::string path = std::string(made) + "/rows";
  const auto store = Open(Options(redis.url()));
  std::string error;
  CHECK(store->Export(path, &error));
  const auto local = Open(Options(""));
  CHECK(local->Import(path, &error));
  CHECK((Get(local.get(), {2, -7, 8}) ==
         std::vector<std::vector<int64_t>>{{3, 4}, {3, 4}, {}}));
  redis.Commands();
  CHECK(store->Import(path, &error));
  const auto commands = redis.Commands();
  CHECK(commands.size() == 2 && commands[0][3] == "p:v2:3x2:-7");
  CHECK(commands[1][3] == "p:v2:3x2:2" && commands[1][6] == "0");
  CHECK(commands[1][8] + commands[1][9] == rows);  // times of writing too

  second_page = Bulk("0") + "*1\r\n" + Bulk("p:v2:3x2:2x");
  CHECK(!store->Export(path, &error));
  CHECK(error.find("key p:v2:3x2:2x: it is none of a task") !=
        std::string::npos);
  second_page = "+no\r\n+list\r\n";
  CHECK(!store->Export(path, &error));
  CHECK(error.find("its list of keys cannot be read") != std::string::npos);
  CHECK(unlink(path.c_str()) == 0 && rmdir(made) == 0);  // and nothing else
}

void ADeadRedisIsCounted() {
  std::unique_ptr<SupportStore> store;
  {
    FakeRedis redis([](const Words&) { return "*1\r\n$-1\r\n"; });
    store = Open(Options(redis.url()));
  }
  CHECK((Put(store.get(), {1, 1, 2}, {1, 0, 3}) ==
         std::vector<int32_t>{kUnreachable, kBadTime, kUnreachable}));
  CHECK(Get(store.get(), {1, 2})[1].empty());
  const SupportStats stats = store->Stats();
  CHECK(stats.write_errors == 2 && stats.read_errors == 2);
  CHECK(stats.tasks == -1 && stats.bytes == -1 && stats.evicted == -1);
  std::string error;
  CHECK(!store->Export("/tmp/redis_support_dead", &error));
  CHECK(error.find("127.0.0.1") != std::string::npos);
}

void StatsAreThoseOfTheRedis() {
  FakeRedis redis([](const Words& words) -> std::string {
    if (words[0] != "INFO") return "*1\r\n$-1\r\n";
    return Bulk(
        "# Memory\r\nused_memory:4096\r\nused_memory_rss:9\r\n# Stats\r\n"
        "expired_keys:3\r\nevicted_keys:4\r\n# Keyspace\r\n"
        "db0:keys=17,expires=1\r\n");
  });
  const SupportStats stats = Open(Options(redis.url()))->Stats();
  CHECK(stats.tasks == 17 && stats.bytes == 4096 && stats.evicted == 7);
  CHECK(stats.rows == -1);
}

}  // namespace
}  // namespace qianmo

int main() {
  qianmo::WhatCannotBeOpened();
  qianmo::RowsAreReadAndBadValuesAreNot();
  qianmo::LargeTasksAreReadFewAtATime();
  qianmo::TasksThatMoveAreAskedFor();
  qianmo::RowsArePutTaskByTask();
  qianmo::AClockThatIsSetChangesNothing();
  qianmo::ExportsAreThoseOfALocalStore();
  qianmo::ADeadRedisIsCounted();
  qianmo::StatsAreThoseOfTheRedis();
}
