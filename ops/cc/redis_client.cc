#include "ops/cc/redis_client.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <utility>

namespace qianmo {
namespace {

constexpr size_t kSlots = 16384;
constexpr uint16_t kNoNode = 0xffff;
constexpr size_t kKeysOfCommand = 256;
constexpr int kRounds = 5;
constexpr auto kFirstPause = std::chrono::milliseconds(100);
constexpr auto kLongestPause = std::chrono::seconds(2);

std::string Variable(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

bool StartsWith(std::string_view text, std::string_view start) {
  return text.substr(0, start.size()) == start;
}

// Cuts off what stands before a separator; all of it if there is none.
std::string_view Cut(std::string_view* text, char separator) {
  const size_t end = std::min(text->find(separator), text->size());
  const std::string_view first = text->substr(0, end);
  text->remove_prefix(std::min(end + 1, text->size()));
  return first;
}

bool ParseInt(std::string_view text, int least, int most, int* value) {
  const auto parsed =
      std::from_chars(text.data(), text.data() + text.size(), *value);
  return parsed.ec == std::errc() && parsed.ptr == text.data() + text.size() &&
         *value >= least && *value <= most;
}

// HOST:PORT, an IPv6 host in brackets or not.
bool ParseAddress(std::string_view text, RedisAddress* address) {
  const size_t colon = text.rfind(':');
  if (colon == std::string_view::npos) return false;
  std::string_view host = text.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  address->host = host;
  return ParseInt(text.substr(colon + 1), 1, 65535, &address->port);
}

}  // namespace

bool RedisUrl::Parse(const std::string& text, RedisUrl* url,
                     std::string* error) {
  const auto refuse = [&text, error](const std::string& what) {
    // What stands before the last @ may hold a password.
    *error = text.substr(text.rfind('@') + 1) + ": " + what;
    return false;
  };
  std::string_view rest = text;
  const size_t scheme_end = rest.find("://");
  if (scheme_end == std::string_view::npos) return refuse("it is no URL");
  const std::string_view scheme = rest.substr(0, scheme_end);
  rest.remove_prefix(scheme_end + 3);
  url->access.tls = StartsWith(scheme, "rediss");
  url->cluster = scheme == "redis+cluster" || scheme == "rediss+cluster";
  if (!url->cluster && scheme != "redis" && scheme != "rediss") {
    return refuse(
        "its scheme should be redis, rediss, redis+cluster or rediss+cluster");
  }
  std::string_view options = rest;
  rest = Cut(&options, '?');
  std::string_view prefix = rest;
  std::string_view hosts = Cut(&prefix, '/');
  if (const size_t at = hosts.rfind('@'); at != std::string_view::npos) {
    url->access.user = hosts.substr(0, at);
    hosts.remove_prefix(at + 1);
    if (url->access.user.find(':') != std::string::npos) {
      // Not to be repeated in a message.
      *error =
          "A Redis URL should hold no password, which others can read there. "
          "Give it in the environment, as QIANMO_REDIS_PASSWORD";
      return false;
    }
  }
  url->access.password = Variable("QIANMO_REDIS_PASSWORD");
  while (!hosts.empty()) {
    RedisAddress address;
    if (!ParseAddress(Cut(&hosts, ','), &address)) {
      return refuse("each address should be HOST:PORT");
    }
    url->addresses.push_back(address);
  }
  if (url->addresses.empty() || (url->addresses.size() > 1 && !url->cluster)) {
    return refuse("it should name one address, or some of a cluster");
  }
  const bool named = std::all_of(prefix.begin(), prefix.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           (c >= '0' && c <= '9') || c == '_' || c == '-' || c == '.' ||
           c == ':';
  });
  if (prefix.empty() || !named) {
    return refuse(
        "after the address and a slash should stand the prefix of its keys, "
        "letters, digits and any of _-.:");
  }
  url->prefix = prefix;
  while (!options.empty()) {
    std::string_view value = Cut(&options, '&');
    const std::string_view name = Cut(&value, '=');
    int number = 0;
    if (name == "timeout_ms" && ParseInt(value, 1, 600000, &number)) {
      url->timeout = std::chrono::milliseconds(number);
    } else if (name == "on_failure" &&
               (value == "error" || value == "default")) {
      url->fails = value == "error";
    } else if (name == "ca" && url->access.tls && !value.empty()) {
      url->access.ca = value;
    } else {
      return refuse(
          "its options should be timeout_ms=1 to 600000, on_failure=error or "
          "default, and ca=FILE of rediss. Received: " +
          std::string(name) + "=" + std::string(value));
    }
  }
  return true;
}

bool IsRedisUrl(const std::string& path) {
  return path.rfind("redis", 0) == 0 && path.find("://") != std::string::npos;
}

uint16_t RedisHash(std::string_view bytes, uint16_t before) {
  static const auto* const table = [] {
    auto* const made = new std::array<uint16_t, 256>;
    for (unsigned i = 0; i < 256; ++i) {
      unsigned crc = i << 8;
      for (int bit = 0; bit < 8; ++bit) {
        crc = (crc << 1) ^ (crc & 0x8000u ? 0x1021u : 0);
      }
      (*made)[i] = static_cast<uint16_t>(crc);
    }
    return made;
  }();
  unsigned crc = before;
  for (const char c : bytes) {
    crc =
        (crc << 8) ^ (*table)[(crc >> 8 ^ static_cast<unsigned char>(c)) & 255];
    crc &= 0xffff;
  }
  return static_cast<uint16_t>(crc);
}

RedisClient::Answers::~Answers() {
  for (Held& held : held_) {
    std::lock_guard<std::mutex> lock(held.node->mutex);
    if (held.node->fault.empty()) {
      held.node->idle.push_back(std::move(held.connection));
    }
  }
}

RedisClient::RedisClient(RedisUrl url) : url_(std::move(url)) {
  name_ = "redis://" + url_.addresses[0].Text() + "/" + url_.prefix;
}

std::shared_ptr<RedisClient> RedisClient::Open(const std::string& text,
                                               std::string* error) {
  static std::mutex* const mutex = new std::mutex;
  static auto* const all =
      new std::map<std::string, std::weak_ptr<RedisClient>>;
  RedisUrl url;
  if (!RedisUrl::Parse(text, &url, error)) return nullptr;
  std::lock_guard<std::mutex> lock(*mutex);
  auto& known = (*all)[text];
  auto client = known.lock();
  if (client != nullptr) return client;
  client.reset(new RedisClient(std::move(url)));
  if (client->url_.cluster) {
    if (!client->RefreshMap(error)) {
      *error = client->name_ + ": " + *error;
      return nullptr;
    }
  } else {
    auto map = std::make_shared<Map>();
    map->nodes.push_back(client->NodeAt(client->url_.addresses[0]));
    client->map_ = std::move(map);
  }
  known = client;
  return client;
}

std::shared_ptr<const RedisClient::Map> RedisClient::map() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return map_;
}

std::shared_ptr<RedisClient::Node> RedisClient::NodeAt(
    const RedisAddress& address) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto& node = nodes_[address];
  if (node == nullptr) node = std::make_shared<Node>(address);
  return node;
}

void RedisClient::MarkDown(Node* node, const std::string& fault) {
  map_is_old_ = true;
  std::lock_guard<std::mutex> lock(node->mutex);
  node->idle.clear();
  if (!node->fault.empty()) return;
  node->fault = fault;
  node->pause = kFirstPause;
  node->retry_at = RedisClock::now() + node->pause;
  std::fprintf(stderr, "qianmo: %s: node %s is down: %s\n", name_.c_str(),
               node->address.Text().c_str(), fault.c_str());
}

bool RedisClient::Connect(Batch* batch, RedisClock::time_point until,
                          std::string* error) {
  Node* const node = batch->node.get();
  {
    std::lock_guard<std::mutex> lock(node->mutex);
    if (!node->fault.empty()) {
      *error = node->address.Text() + ": " + node->fault;
      return false;
    }
    if (batch->again) node->idle.clear();
    if (!node->idle.empty()) {
      batch->connection = std::move(node->idle.back());
      node->idle.pop_back();
      return true;
    }
  }
  if (RedisClock::now() >= until) {  // spent on another node
    *error = node->address.Text() + ": no time was left to connect";
    return false;
  }
  batch->is_new = true;
  batch->connection =
      RedisConnection::Open(node->address, url_.access, until, error);
  if (batch->connection != nullptr) return true;
  MarkDown(node, *error);
  *error = node->address.Text() + ": " + *error;
  return false;
}

void RedisClient::SendKeys(const std::vector<RedisKey>& keys,
                           const AddCommand& add, Batch* batch) const {
  const size_t count = batch->keys.size();
  if (add) {
    for (const uint32_t key : batch->keys) {
      if (batch->asking) batch->connection->Add({"ASKING"});
      add(key, batch->connection.get());
    }
    return;
  }
  for (size_t begin = 0; begin < count; begin += kKeysOfCommand) {
    const size_t end = std::min(begin + kKeysOfCommand, count);
    if (batch->asking) batch->connection->Add({"ASKING"});
    batch->connection->AddCommand(1 + end - begin);
    batch->connection->AddWord("MGET");
    for (size_t i = begin; i < end; ++i) {
      batch->connection->AddWord(keys[batch->keys[i]].text);
    }
  }
}

bool RedisClient::Redirected(std::string_view reply, const Node& from,
                             std::shared_ptr<Node>* to, bool* asking) {
  *asking = StartsWith(reply, "ASK ");
  if (!*asking && !StartsWith(reply, "MOVED ")) return false;
  Cut(&reply, ' ');
  Cut(&reply, ' ');
  RedisAddress address;
  if (!ParseAddress(reply, &address)) return false;
  if (address.host.empty()) address.host = from.address.host;
  *to = NodeAt(address);
  if (!*asking) map_is_old_ = true;
  return true;
}

void RedisClient::TakeValues(const Batch& batch, bool one_each,
                             std::vector<Batch>* next, Answers* answers) {
  const RedisReader& replies = batch.connection->replies();
  const auto& parts = replies.parts();
  const size_t count = batch.keys.size();
  const size_t step = one_each ? 1 : kKeysOfCommand;
  size_t at = 0;
  for (size_t begin = 0; begin < count; begin += step) {
    const size_t end = std::min(begin + step, count);
    if (batch.asking) ++at;
    const RedisPart& head = parts[at++];
    if (one_each && head.type == '$') {
      answers->values[batch.keys[begin]] = {replies.text(head).data(),
                                            head.number};
      continue;
    }
    if (!one_each && head.type == '*' &&
        head.number == static_cast<int64_t>(end - begin)) {
      for (size_t i = begin; i < end; ++i, ++at) {
        const std::string_view text = replies.text(parts[at]);
        answers->values[batch.keys[i]] = {
            text.data(), parts[at].type != '$'  ? RedisValue::kLost
                         : parts[at].number < 0 ? RedisValue::kNone
                                                : parts[at].number};
      }
      continue;
    }
    std::shared_ptr<Node> to;
    bool asking = false;
    const std::string_view text = replies.text(head);
    if (head.type != '-' || !Redirected(text, *batch.node, &to, &asking)) {
      answers->error = batch.node->address.Text() + ": " + std::string(text);
      if (head.type == '*') at += static_cast<size_t>(head.number);
      if (StartsWith(text, "NOAUTH")) {
        answers->error += " Give its password as QIANMO_REDIS_PASSWORD.";
      }
      continue;
    }
    auto found = std::find_if(
        next->begin(), next->end(), [&to, asking](const Batch& other) {
          return other.node == to && other.asking == asking;
        });
    if (found == next->end()) {
      found = next->emplace(next->end());
      found->node = to;
      found->asking = asking;
    }
    found->keys.insert(found->keys.end(),
                       batch.keys.begin() + static_cast<std::ptrdiff_t>(begin),
                       batch.keys.begin() + static_cast<std::ptrdiff_t>(end));
  }
}

bool RedisClient::SomeDown(const std::vector<Batch>& batches,
                           std::string* error) {
  for (const Batch& batch : batches) {
    if (batch.keys.empty()) continue;
    std::lock_guard<std::mutex> lock(batch.node->mutex);
    if (batch.node->fault.empty()) continue;
    *error = batch.node->address.Text() + ": " + batch.node->fault;
    return true;
  }
  return false;
}

RedisClient::Answers RedisClient::Get(const std::vector<RedisKey>& keys,
                                      bool whole) {
  // A command of a cluster has keys of one slot.
  if (!url_.cluster) return Ask(keys, nullptr, whole);
  return Ask(
      keys,
      [&keys](size_t key, RedisConnection* connection) {
        connection->Add({"GET", keys[key].text});
      },
      whole);
}

RedisClient::Answers RedisClient::Ask(const std::vector<RedisKey>& keys,
                                      const AddCommand& add, bool whole) {
  const auto until = RedisClock::now() + url_.timeout;
  Answers answers;
  answers.values.resize(keys.size());
  const auto map = this->map();
  std::vector<Batch> batches(map->nodes.size());
  for (size_t i = 0; i < batches.size(); ++i) batches[i].node = map->nodes[i];
  for (size_t i = 0; i < keys.size(); ++i) {
    size_t node = 0;
    if (!map->of_slot.empty()) node = map->of_slot[keys[i].hash % kSlots];
    if (node < batches.size()) {
      batches[node].keys.push_back(static_cast<uint32_t>(i));
    } else {
      answers.error =
          "no node serves slot " + std::to_string(keys[i].hash % kSlots);
      map_is_old_ = true;
    }
  }
  for (int round = 0; round < kRounds && !batches.empty(); ++round) {
    // Where the request fails anyway, it need not keep the others busy.
    if (whole && SomeDown(batches, &answers.error)) return answers;
    std::vector<RedisConnection*> used;
    std::vector<Batch> next;
    for (Batch& batch : batches) {
      if (batch.keys.empty()) continue;
      if (Connect(&batch, until, &answers.error)) {
        SendKeys(keys, add, &batch);
        used.push_back(batch.connection.get());
      }
    }
    RedisConnection::Exchange(used, until);
    for (Batch& batch : batches) {
      if (batch.connection == nullptr) continue;
      const std::string& fault = batch.connection->error();
      if (fault.empty()) {
        TakeValues(batch, add != nullptr, &next, &answers);
        answers.held_.push_back({batch.node, std::move(batch.connection)});
      } else if (!batch.is_new && !batch.connection->is_late()) {
        // Redis may close what was idle, and does when it starts anew.
        batch.again = true;
        batch.connection.reset();
        next.push_back(std::move(batch));
      } else {
        answers.error = batch.node->address.Text() + ": " + fault;
        MarkDown(batch.node.get(), fault);
      }
    }
    batches.swap(next);
  }
  if (!batches.empty()) answers.error = "its slots move faster than requests";
  return answers;
}

bool RedisClient::AskNode(const std::shared_ptr<Node>& node,
                          std::initializer_list<std::string_view> command,
                          const std::function<bool(const RedisReader&)>& take,
                          std::string* error) {
  const auto until = RedisClock::now() + url_.timeout;
  Batch batch;
  batch.node = node;
  while (true) {
    if (!Connect(&batch, until, error)) return false;
    batch.connection->Add(command);
    RedisConnection::Exchange({batch.connection.get()}, until);
    const std::string fault = batch.connection->error();
    if (fault.empty()) break;
    if (batch.is_new || batch.connection->is_late()) {
      MarkDown(node.get(), fault);
      *error = node->address.Text() + ": " + fault;
      return false;
    }
    batch.again = true;
  }
  Answers answers;  // gives the connection back
  answers.held_.push_back({node, std::move(batch.connection)});
  const RedisReader& reader = answers.held_[0].connection->replies();
  if (reader.parts()[0].type == '-') {
    *error = node->address.Text() + ": " +
             std::string(reader.text(reader.parts()[0]));
    return false;
  }
  return take(reader);
}

bool RedisClient::Info(const std::function<void(std::string_view)>& take,
                       std::string* error) {
  const auto map = this->map();
  for (const auto& node : map->nodes) {
    const auto take_one = [&take](const RedisReader& reader) {
      take(reader.text(reader.parts()[0]));
      return true;
    };
    if (!AskNode(node, {"INFO"}, take_one, error)) return false;
  }
  return true;
}

bool RedisClient::Scan(
    const std::string& pattern,
    const std::function<bool(const std::vector<std::string>&)>& take,
    std::string* error) {
  const auto map = this->map();
  for (const auto& node : map->nodes) {
    std::string cursor = "0";
    do {
      std::vector<std::string> keys;
      const auto take_some = [&](const RedisReader& reader) {
        const auto& parts = reader.parts();
        if (parts.size() < 3 || parts[1].type != '$' || parts[2].type != '*') {
          *error = node->address.Text() + ": its list of keys cannot be read";
          return false;
        }
        cursor = reader.text(parts[1]);
        for (size_t i = 3; i < parts.size(); ++i) {
          keys.emplace_back(reader.text(parts[i]));
        }
        return true;
      };
      if (!AskNode(node, {"SCAN", cursor, "MATCH", pattern, "COUNT", "1000"},
                   take_some, error) ||
          !take(keys)) {
        return false;
      }
    } while (cursor != "0");
  }
  return true;
}

bool RedisClient::ReadSlots(Node* node, std::string* error) {
  const auto until = RedisClock::now() + url_.timeout;
  const auto connection =
      RedisConnection::Open(node->address, url_.access, until, error);
  if (connection == nullptr) return false;
  connection->Add({"CLUSTER", "SLOTS"});
  RedisConnection::Exchange({connection.get()}, until);
  *error = connection->error();
  if (!error->empty()) return false;
  const auto& parts = connection->replies().parts();
  const auto text = [&](size_t at) {
    return connection->replies().text(parts[at]);
  };
  if (parts[0].type != '*') {
    *error = text(0);
    return false;
  }
  auto map = std::make_shared<Map>();
  map->of_slot.assign(kSlots, kNoNode);
  // Where what follows the part ends, with all that it holds.
  const auto end_of = [&parts](size_t at) {
    for (size_t open = 1; open > 0; ++at, --open) {
      if (parts[at].type == '*' && parts[at].number > 0) {
        open += static_cast<size_t>(parts[at].number);
      }
    }
    return at;
  };
  // Each range: first slot, last slot, [host, port, ...] of who serves it, and
  // of its replicas.
  for (size_t at = 1; at < parts.size(); at = end_of(at)) {
    if (parts[at].type != '*' || parts[at].number < 3 ||
        parts[at + 1].type != ':' || parts[at + 2].type != ':' ||
        parts[at + 3].type != '*' || parts[at + 3].number < 2 ||
        parts[at + 5].type != ':') {
      *error = "its list of slots cannot be read";
      return false;
    }
    RedisAddress address = {std::string(text(at + 4)),
                            static_cast<int>(parts[at + 5].number)};
    if (address.host.empty()) address.host = node->address.host;
    const auto serves = NodeAt(address);
    const auto known = std::find(map->nodes.begin(), map->nodes.end(), serves);
    const auto place = static_cast<uint16_t>(known - map->nodes.begin());
    if (known == map->nodes.end()) map->nodes.push_back(serves);
    for (int64_t slot = std::max<int64_t>(parts[at + 1].number, 0);
         slot <= std::min<int64_t>(parts[at + 2].number, kSlots - 1); ++slot) {
      map->of_slot[static_cast<size_t>(slot)] = place;
    }
  }
  if (map->nodes.empty()) {
    *error = "no node of the cluster serves any slot";
    return false;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  map_ = std::move(map);
  return true;
}

bool RedisClient::RefreshMap(std::string* error) {
  std::vector<std::shared_ptr<Node>> asked;
  if (const auto now = map()) asked = now->nodes;
  for (const RedisAddress& address : url_.addresses) {
    asked.push_back(NodeAt(address));
  }
  for (const auto& node : asked) {
    {
      std::lock_guard<std::mutex> lock(node->mutex);
      *error = node->fault;
    }
    if (error->empty() && ReadSlots(node.get(), error)) return true;
    *error = node->address.Text() + ": " + *error;
  }
  return false;
}

void RedisClient::Maintain() {
  std::lock_guard<std::mutex> maintaining(maintaining_);
  const auto now = map();
  bool some_down = false;
  for (const auto& node : now->nodes) {
    {
      std::lock_guard<std::mutex> lock(node->mutex);
      if (node->fault.empty()) continue;
      some_down = true;
      if (RedisClock::now() < node->retry_at) continue;
    }
    const auto until = RedisClock::now() + url_.timeout;
    std::string error;
    auto connection =
        RedisConnection::Open(node->address, url_.access, until, &error);
    bool up = false;
    if (connection != nullptr) {
      connection->Add({"PING"});
      RedisConnection::Exchange({connection.get()}, until);
      up = connection->error().empty() &&
           connection->replies().parts()[0].type == '+';
    }
    std::lock_guard<std::mutex> lock(node->mutex);
    if (up) {
      node->fault.clear();
      node->idle.push_back(std::move(connection));
      std::fprintf(stderr, "qianmo: %s: node %s is up again\n", name_.c_str(),
                   node->address.Text().c_str());
    } else {
      node->pause =
          std::min<RedisClock::duration>(2 * node->pause, kLongestPause);
      node->retry_at = RedisClock::now() + node->pause;
    }
  }
  if (url_.cluster && (map_is_old_.exchange(false) || some_down)) {
    std::string error;
    if (!RefreshMap(&error)) map_is_old_ = true;
  }
}

}  // namespace qianmo
