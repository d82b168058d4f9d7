#include "ops/cc/redis_client.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "ops/cc/check.h"

namespace qianmo {
namespace {

// Gives the reader bytes in pieces of up to `most`. False when it refuses them.
bool Feed(RedisReader* reader, const std::string& bytes, size_t most) {
  std::string error;
  for (size_t at = 0; at < bytes.size();) {
    size_t room;
    char* const to = reader->Room(&room);
    const size_t n = std::min({room, most, bytes.size() - at});
    std::memcpy(to, bytes.data() + at, n);
    at += n;
    if (!reader->Take(n, &error)) {
      CHECK(!error.empty());
      return false;
    }
  }
  return true;
}

const char kReplies[] =
    "*3\r\n$5\r\nab\r\nc\r\n$-1\r\n$0\r\n\r\n"
    "-MOVED 7 127.0.0.1:1\r\n"
    ":-42\r\n"
    "*1\r\n*2\r\n:1\r\n+OK\r\n";

void RepliesAreReadHoweverTheyArrive() {
  const std::string bytes(kReplies, sizeof(kReplies) - 1);
  for (const size_t most : {1, 2, 3, 7, 1000}) {
    RedisReader reader;
    for (int again = 0; again < 2; ++again) {
      reader.Expect(4);
      CHECK(Feed(&reader, bytes, most));
      CHECK(reader.whole());
      const auto& parts = reader.parts();
      CHECK(parts.size() == 10);
      CHECK(reader.text(parts[1]) == "ab\r\nc");
      CHECK(parts[2].number == -1);
      CHECK(parts[3].number == 0);
      CHECK(parts[4].type == '-');
      CHECK(reader.text(parts[4]) == "MOVED 7 127.0.0.1:1");
      CHECK(parts[5].number == -42);
      CHECK(parts[7].type == '*' && parts[7].number == 2);
      CHECK(reader.text(parts[9]) == "OK");
    }
  }
}

void WhatIsNoReplyIsRefused() {
  for (const char* bytes : {"HTTP/1.1 400\r\n", "$5\r\nabcdeXX", "$-2\r\n",
                            "*-7\r\n", ":\r\n", ":1x\r\n", "$99999999999\r\n",
                            "*99999999999\r\n", "+\n", "+OK\r\n+OK\r\n"}) {
    RedisReader reader;
    reader.Expect(1);
    CHECK(!Feed(&reader, bytes, 1000));
  }
  RedisReader reader;
  reader.Expect(1);
  CHECK(!Feed(&reader, std::string(100000, '+'), 1000));  // a line without end
}

// Damaged replies are refused or read; nothing is read past their end.
void Fuzz() {
  const std::string good(kReplies, sizeof(kReplies) - 1);
  std::mt19937 random(1);
  int refused = 0, whole = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string bytes = good;
    for (unsigned k = 0; k <= random() % 3; ++k) {
      const size_t at = random() % bytes.size();
      if (random() % 3 == 0) {
        bytes[at] = "0123456789*$+-:\r\n"[random() % 17];
      } else {
        bytes[at] = static_cast<char>(random());
      }
    }
    RedisReader reader;
    reader.Expect(4);
    if (!Feed(&reader, bytes, 1 + random() % 40)) {
      ++refused;
      continue;
    }
    whole += reader.whole();
    size_t sum = 0;
    for (const RedisPart& part : reader.parts()) {
      if (part.type != ':' && part.type != '*') {
        for (const char c : reader.text(part)) sum += c != 0;
      }
    }
    CHECK(sum <= bytes.size());
  }
  CHECK(refused > 500);
  CHECK(whole > 500);
}

void HashIsThatOfTheCluster() {
  CHECK(RedisHash("123456789") == 0x31c3);
  CHECK(RedisHash("6789", RedisHash("12345")) == 0x31c3);
  CHECK(RedisHash("") == 0);
}

void UrlsAreRead() {
  setenv("QIANMO_REDIS_PASSWORD", "secret", 1);
  std::string error;
  RedisUrl url;
  CHECK(RedisUrl::Parse("redis://localhost:6379/shop:v1", &url, &error));
  CHECK(!url.cluster && !url.access.tls && url.fails);
  CHECK(url.addresses.size() == 1 && url.addresses[0].host == "localhost");
  CHECK(url.addresses[0].port == 6379);
  CHECK(url.prefix == "shop:v1");
  CHECK(url.access.password == "secret");
  RedisUrl other;
  CHECK(RedisUrl::Parse(
      "rediss+cluster://me@a:1,[::1]:2/p?timeout_ms=7&on_failure=default&ca=/c",
      &other, &error));
  CHECK(other.cluster && other.access.tls && !other.fails);
  CHECK(other.addresses.size() == 2 && other.addresses[1].host == "::1");
  CHECK(other.access.user == "me" && other.access.ca == "/c");
  CHECK(other.timeout.count() == 7);
  for (const char* text :
       {"http://a:1/p", "redis://a/p", "redis://a:1", "redis://a:1/",
        "redis://a:1/p/q", "redis://a:1/{p}", "redis://a:0/p",
        "redis://a:65536/p", "redis://a:1x/p", "redis:///p",
        "redis://a:1,b:2/p", "redis://a:1/p?timeout_ms=0",
        "redis://a:1/p?timeout_ms=7ms", "redis://a:1/p?on_failure=zero",
        "redis://a:1/p?ca=/c", "redis://a:1/p?other=1", "redis"}) {
    RedisUrl refused;
    error.clear();
    CHECK(!RedisUrl::Parse(text, &refused, &error));
    CHECK(error.rfind(text, 0) == 0);
  }
  CHECK(!RedisUrl::Parse("redis://me:pw12@a:1/p", &url, &error));
  CHECK(error.find("pw12") == std::string::npos);
  CHECK(error.find("QIANMO_REDIS_PASSWORD") != std::string::npos);
}

void NobodyAnswers() {
  std::string error;
  // Nothing listens on port 1.
  CHECK(RedisClient::Open("redis+cluster://127.0.0.1:1/p", &error) == nullptr);
  CHECK(error.find("Connection refused") != std::string::npos);
  const auto client = RedisClient::Open("redis://127.0.0.1:1/p", &error);
  CHECK(client != nullptr);
  CHECK(RedisClient::Open("redis://127.0.0.1:1/p", &error) == client);
  for (int i = 0; i < 3; ++i) {
    const auto found = client->Get({{"key", RedisHash("key")}});
    CHECK(found.values[0].size == RedisValue::kLost);
    CHECK(found.error == "127.0.0.1:1: Connection refused");
    client->Maintain();
  }
}

void Run() {
  RepliesAreReadHoweverTheyArrive();
  WhatIsNoReplyIsRefused();
  Fuzz();
  HashIsThatOfTheCluster();
  UrlsAreRead();
  NobodyAnswers();
}

}  // namespace
}  // namespace qianmo

int main() { qianmo::Run(); }
