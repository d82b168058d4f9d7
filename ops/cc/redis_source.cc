#include "ops/cc/redis_source.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "ops/cc/redis_client.h"

namespace qianmo {
namespace {

constexpr size_t kIdChars = 20;

// A table with the rows that were fetched of it.
class FetchedTable : public EmbeddingTable {
 public:
  FetchedTable(TableLayout layout, std::string keys)
      : EmbeddingTable(std::move(layout)),
        keys_(std::move(keys)),
        keys_hash_(RedisHash(keys_)) {}

  // What the keys of its rows begin with.
  const std::string& keys() const { return keys_; }

  // Makes room for ids.
  void Reserve(size_t count) {
    size_t size = 64;
    while (size < 2 * count) size *= 2;
    slots_.assign(size, Slot());
  }

  // Takes an id, for which there is room. False if it had it, or if there is no
  // row of that id: no other table knows that without asking.
  bool Add(int64_t id, uint32_t key) {
    if (!layout().hashed && static_cast<uint64_t>(id) >= num_rows()) {
      return false;
    }
    Slot* const slot = At(id);
    if (slot->used) return false;
    *slot = {id, key, true, nullptr};
    return true;
  }

  // Writes the key of an id to `to`, which has room.
  RedisKey WriteKey(int64_t id, char* to) const {
    std::memcpy(to, keys_.data(), keys_.size());
    char* const digits = to + keys_.size();
    char* const end = std::to_chars(digits, digits + kIdChars, id).ptr;
    const auto size = static_cast<size_t>(end - digits);
    return {{to, keys_.size() + size}, RedisHash({digits, size}, keys_hash_)};
  }

  // Takes the rows of its ids. Counts those that should be there and are not;
  // they read as the default row. False and an error when a value is no row.
  bool TakeRows(const std::vector<RedisValue>& values, int64_t* lost,
                std::string* error) {
    for (Slot& slot : slots_) {
      if (!slot.used) continue;
      const RedisValue& value = values[slot.key];
      if (value.size == RedisValue::kLost ||
          (value.size == RedisValue::kNone && !layout().hashed)) {
        slot.row = default_row_ == nullptr ? nullptr : default_row_->data();
        ++*lost;
      } else if (value.size == static_cast<int64_t>(layout().row_bytes)) {
        slot.row = value.data;
      } else if (value.size != RedisValue::kNone) {
        *error = "key " + keys_ + std::to_string(slot.id) + " has " +
                 std::to_string(value.size) + " bytes, and a row has " +
                 std::to_string(layout().row_bytes);
        return false;
      }
    }
    return true;
  }

  // Keeps the only row that it has, which is that of the default id.
  bool KeepDefault(const RedisValue& value) {
    if (value.size != static_cast<int64_t>(layout().row_bytes)) return false;
    default_row_ = std::make_shared<const std::string>(
        value.data, static_cast<size_t>(value.size));
    At(layout().default_id)->row = default_row_->data();
    return ReadDefault();
  }

 private:
  struct Slot {
    int64_t id = 0;
    uint32_t key = 0;
    bool used = false;
    const char* row = nullptr;
  };

  // The id's slot, or the free one where it should be.
  const Slot* At(int64_t id) const {
    const size_t mask = slots_.size() - 1;
    size_t at = HashId(id) & mask;
    while (slots_[at].used && slots_[at].id != id) at = (at + 1) & mask;
    return &slots_[at];
  }
  Slot* At(int64_t id) {
    return const_cast<Slot*>(std::as_const(*this).At(id));
  }

  void Find(const int64_t* ids, size_t n, const char** rows) const override {
    for (size_t i = 0; i < n; ++i) rows[i] = At(ids[i])->row;
  }

  std::string keys_;
  uint16_t keys_hash_;
  std::vector<Slot> slots_;
  std::shared_ptr<const std::string> default_row_;
};

class RedisVersion : public EmbeddingVersion {
 public:
  static std::shared_ptr<const RedisVersion> Open(
      std::shared_ptr<RedisClient> client, int64_t number, std::string* error);

  const EmbeddingTable* table(const std::string& name) const override {
    const auto found = tables_.find(name);
    return found == tables_.end() ? nullptr : &found->second;
  }

  bool is_remote() const override { return true; }
  std::shared_ptr<const EmbeddingVersion> Fetch(
      const std::vector<WantedIds>& wanted, std::string* error) const override;

 private:
  std::shared_ptr<RedisClient> client_;
  std::map<std::string, FetchedTable> tables_;  // with the default rows alone
};

// What was fetched for one request.
class FetchedVersion : public EmbeddingVersion {
 public:
  FetchedVersion(const EmbeddingVersion& of, std::shared_ptr<RedisClient> from)
      : client_(std::move(from)) {
    version_ = of.version();
    space_ = of.space();
    where_ = of.where();
  }

  const EmbeddingTable* table(const std::string& name) const override {
    const auto found = tables_.find(name);
    return found == tables_.end() ? nullptr : &found->second;
  }

  // Gets the rows of all ids that the tables took.
  bool Get(const std::vector<RedisKey>& keys, std::string* error) {
    answers_ = std::make_unique<RedisClient::Answers>(
        client_->Get(keys, client_->url().fails));
    int64_t lost = 0;
    for (auto& [name, table] : tables_) {
      const int64_t before = lost;
      if (!table.TakeRows(answers_->values, &lost, error)) {
        *error = client_->name() + ": " + *error;
        return false;
      }
      if (lost > before && answers_->error.empty()) {
        answers_->error = "rows of table `" + name + "` of version " +
                          std::to_string(version_) +
                          " are gone; load the version again";
      }
    }
    if (lost == 0) return true;
    client_->CountLost(lost);
    *error = client_->name() + ": " + answers_->error;
    return !client_->url().fails;
  }

  std::map<std::string, FetchedTable>& tables() { return tables_; }

 private:
  std::shared_ptr<RedisClient> client_;
  std::map<std::string, FetchedTable> tables_;
  std::unique_ptr<RedisClient::Answers> answers_;  // holds the rows
};

std::shared_ptr<const RedisVersion> RedisVersion::Open(
    std::shared_ptr<RedisClient> client, int64_t number, std::string* error) {
  const auto refuse = [&client, error](const std::string& key,
                                       const std::string& what) {
    *error = client->name() + ": key " + key + ": " + what;
    return nullptr;
  };
  const std::string of_version =
      client->url().prefix + ":" + std::to_string(number) + ":";
  const std::string key = of_version + "MANIFEST";
  const auto found = client->Get({{key, RedisHash(key)}});
  const RedisValue& text = found.values[0];
  if (text.size == RedisValue::kLost) return refuse(key, found.error);
  if (text.size == RedisValue::kNone) {
    return refuse(key, "there is none; the version was not loaded");
  }
  const auto version = std::make_shared<RedisVersion>();
  version->client_ = client;
  version->where_ = client->name();
  std::vector<std::vector<std::string>> lines;
  if (!ParseManifest(std::string(text.data, static_cast<size_t>(text.size)),
                     &lines, &version->version_, &version->space_, error)) {
    return refuse(key, *error);
  }
  if (version->version_ != number) {
    return refuse(key, "it is of version " + std::to_string(version->version_));
  }
  std::vector<std::string> names;
  for (size_t i = 2; i < lines.size(); ++i) {
    TableLayout layout;
    if (!layout.Parse(lines[i]) || version->tables_.count(layout.name) != 0) {
      return refuse(key, "line " + std::to_string(i + 1) +
                             " does not describe another table");
    }
    names.push_back(of_version + layout.name + ":");
    version->tables_.emplace(layout.name, FetchedTable(layout, names.back()));
    names.back() += std::to_string(layout.default_id);
  }
  std::vector<RedisKey> keys;
  for (const std::string& name : names) keys.push_back({name, RedisHash(name)});
  const auto rows = client->Get(keys);
  for (auto& [name, table] : version->tables_) {
    const auto at = std::find_if(
        names.begin(), names.end(), [&table = table](const std::string& k) {
          return k == table.keys() + std::to_string(table.layout().default_id);
        });
    const RedisValue& row =
        rows.values[static_cast<size_t>(at - names.begin())];
    table.Reserve(1);
    table.Add(table.layout().default_id, 0);
    if (!table.KeepDefault(row)) {
      return refuse(*at, row.size == RedisValue::kLost
                             ? rows.error
                             : "it should hold the default row of its table");
    }
  }
  return version;
}

std::shared_ptr<const EmbeddingVersion> RedisVersion::Fetch(
    const std::vector<WantedIds>& wanted, std::string* error) const {
  auto fetched = std::make_shared<FetchedVersion>(*this, client_);
  const auto used = [](const WantedIds& w, size_t row) {
    if (w.lengths == nullptr) return w.width;
    const auto width = static_cast<int64_t>(w.width);
    return static_cast<size_t>(std::clamp<int64_t>(w.lengths[row], 0, width));
  };
  std::map<std::string, size_t> counts;
  for (const WantedIds& w : wanted) {
    size_t& count = counts[w.table->name()];
    for (size_t row = 0; row < w.rows; ++row) count += used(w, row);
  }
  size_t most = 0, bytes = 0;
  for (const auto& [name, count] : counts) {
    auto& table =
        fetched->tables().emplace(name, tables_.at(name)).first->second;
    table.Reserve(count);
    most += count;
    bytes += count * (table.keys().size() + kIdChars);
  }
  // Not a std::string, which would write zeros first.
  const std::unique_ptr<char[]> text(new char[bytes]);
  char* end = text.get();
  std::vector<RedisKey> keys;
  keys.reserve(most);
  for (const WantedIds& w : wanted) {
    FetchedTable& table = fetched->tables().at(w.table->name());
    for (size_t row = 0; row < w.rows; ++row) {
      const int64_t* const ids = w.ids + row * w.width;
      for (size_t i = 0, n = used(w, row); i < n; ++i) {
        if (!table.Add(ids[i], static_cast<uint32_t>(keys.size()))) continue;
        keys.push_back(table.WriteKey(ids[i], end));
        end += keys.back().text.size();
      }
    }
  }
  if (!fetched->Get(keys, error)) return nullptr;
  return fetched;
}

class Redis : public EmbeddingSource {
 public:
  explicit Redis(std::shared_ptr<RedisClient> client)
      : client_(std::move(client)) {}

  bool Changed() override {
    client_->Maintain();
    std::string text, ignored;
    return Read("CURRENT", &text, &ignored) && text != seen_;
  }

  bool ReadCurrent(int64_t* version, std::string* error) override {
    if (!Read("CURRENT", &seen_, error)) return false;
    *version = VersionNumber(seen_);
    if (*version < 0) {
      *error = client_->name() + ": key " + client_->url().prefix +
               ":CURRENT: it should hold a version's number";
    }
    return *version >= 0;
  }

  std::vector<int64_t> Versions() override {
    std::vector<int64_t> found;
    std::string text, ignored;
    Read("VERSIONS", &text, &ignored);
    for (size_t at = 0; at < text.size();) {
      const size_t end = std::min(text.find('\n', at), text.size());
      const std::string line = text.substr(at, end - at);
      const int64_t version = VersionNumber(line.substr(0, line.find(' ')));
      if (version > 0) found.push_back(version);
      at = end + 1;
    }
    std::sort(found.rbegin(), found.rend());
    return found;
  }

  std::shared_ptr<const EmbeddingVersion> Open(int64_t number,
                                               std::string* error) override {
    auto version = opened_[number].lock();
    if (version == nullptr) {
      version = RedisVersion::Open(client_, number, error);
      opened_[number] = version;
    }
    return version;
  }

  int64_t RowsLost() const override { return client_->lost(); }

 private:
  // The value of one of the prefix's own keys. False and an error without one.
  bool Read(const std::string& name, std::string* text, std::string* error) {
    const std::string key = client_->url().prefix + ":" + name;
    const auto found = client_->Get({{key, RedisHash(key)}});
    const RedisValue& value = found.values[0];
    if (value.size >= 0) {
      text->assign(value.data, static_cast<size_t>(value.size));
      return true;
    }
    *error = client_->name() + ": " +
             (value.size == RedisValue::kLost
                  ? found.error
                  : "there is no key " + key + "; no version was loaded");
    return false;
  }

  const std::shared_ptr<RedisClient> client_;
  std::string seen_;  // CURRENT as it was last read
  std::map<int64_t, std::weak_ptr<const RedisVersion>> opened_;
};

}  // namespace

std::unique_ptr<EmbeddingSource> OpenRedis(const std::string& url, bool verify,
                                           std::string* error) {
  if (verify) {
    *error = url.substr(url.rfind('@') + 1) +
             ": `verify` is for files; rows are verified when they are "
             "loaded into Redis";
    return nullptr;
  }
  auto client = RedisClient::Open(url, error);
  if (client == nullptr) return nullptr;
  return std::make_unique<Redis>(std::move(client));
}

}  // namespace qianmo
