#include "ops/cc/embedding_version.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "ops/cc/check.h"

namespace qianmo {
namespace {

using Files = std::map<std::string, std::string>;

constexpr size_t kHeader = 4096;
constexpr int kDim = 3, kShardRows = 64, kRows = 150;

template <typename T>
void Append(std::string* bytes, T value) {
  bytes->append(reinterpret_cast<const char*>(&value), sizeof(value));
}

template <typename T>
void Set(std::string* bytes, size_t at, T value) {
  std::memcpy(&(*bytes)[at], &value, sizeof(value));
}

std::string Hex(uint32_t crc) {
  char text[9];
  std::snprintf(text, sizeof(text), "%08x", crc);
  return text;
}

// Makes the checksums of a header and of a manifest right.
void Seal(std::string* file) {
  if (file->size() >= kHeader) {
    Set(file, kHeader - 4, Crc32(file->data(), kHeader - 4));
  }
}

std::string Sealed(const std::string& lines) {
  return lines + "crc " + Hex(Crc32(lines.data(), lines.size())) + "\n";
}

float Value(int64_t row, int j) {
  return static_cast<float>(row) + 0.25f * static_cast<float>(j);
}

int64_t IdOf(int64_t row) { return row == 0 ? -1 : row * 1000003 - 70; }

std::string Shard(const std::string& table, bool hashed, uint64_t number,
                  const std::vector<int64_t>& rows, std::string* line,
                  int64_t (*id_of)(int64_t) = IdOf) {
  std::string data;
  uint64_t home_slots = 0, num_slots = 0, rows_offset = kHeader;
  if (hashed) {
    for (home_slots = 1; home_slots * 2 < rows.size() * 3; home_slots *= 2) {
    }
    std::vector<Slot> slots(home_slots, Slot{0, Slot::kNoRow});
    for (uint64_t r = 0; r < rows.size(); ++r) {
      uint64_t at = HashId(id_of(rows[r])) & (home_slots - 1);
      for (; at < slots.size() && slots[at].row != Slot::kNoRow; ++at) {
      }
      if (at == slots.size()) slots.push_back(Slot{0, Slot::kNoRow});
      slots[at] = {id_of(rows[r]), r};
    }
    // Any tail is allowed that is not too short.
    slots.resize(slots.size() + home_slots, Slot{0, Slot::kNoRow});
    num_slots = slots.size();
    for (const Slot& slot : slots) Append(&data, slot);
    rows_offset = (kHeader + data.size() + kHeader - 1) / kHeader * kHeader;
    data.resize(rows_offset - kHeader);
  }
  for (const int64_t row : rows) {
    for (int j = 0; j < kDim; ++j) Append(&data, Value(row, j));
  }
  const uint32_t crc = Crc32(data.data(), data.size());
  std::string header = "QMROWS1\n";
  Append(&header, uint32_t{0});
  Append(&header, uint32_t{hashed});
  Append(&header, uint32_t{kDim});
  Append(&header, crc);
  Append(&header, number);
  Append(&header, uint64_t{rows.size()});
  Append(&header, uint64_t{4 * kDim});
  Append(&header, home_slots);
  Append(&header, num_slots);
  Append(&header, rows_offset);
  Append(&header, uint64_t{kHeader + data.size()});
  header += table;
  header.resize(kHeader);
  Seal(&header);
  *line = " rows " + std::to_string(rows.size()) + " bytes " +
          std::to_string(kHeader + data.size()) + " crc " + Hex(crc) + "\n";
  return header + data;
}

// A version with one table of each kind: file name -> bytes.
Files Version() {
  Files files;
  std::string lines = "qianmo embeddings 1\nversion 7 space 5\n";
  std::string line;
  lines += "table d dense float32 dim 3 rows 150 default 0 shard_rows 64\n";
  for (int64_t k = 0; k < 3; ++k) {
    std::vector<int64_t> rows;
    for (int64_t r = k * kShardRows; r < std::min<int64_t>(kRows, (k + 1) * 64);
         ++r) {
      rows.push_back(r);
    }
    const std::string name = "d-" + std::to_string(k) + ".rows";
    files[name] = Shard("d", false, static_cast<uint64_t>(k), rows, &line);
    lines += "shard " + name + line;
  }
  // Rows that changed: they read as the row of twice their id, 300 is new.
  const auto half = [](int64_t row) { return row / 2; };
  files["d-changed.rows"] =
      Shard("d", true, 0xffffffffu, {20, 22, 298, 600}, &line, half);
  lines += "changed d-changed.rows" + line;
  lines += "table h hash float32 dim 3 rows 150 default -1 shard_rows 0\n";
  for (uint64_t k = 0; k < 2; ++k) {
    std::vector<int64_t> rows;
    for (int64_t r = 0; r < kRows; ++r) {
      if (HashId(IdOf(r)) >> 63 == k) rows.push_back(r);
    }
    const std::string name = "h-" + std::to_string(k) + ".rows";
    files[name] = Shard("h", true, k, rows, &line);
    lines += "shard " + name + line;
  }
  files["MANIFEST"] = Sealed(lines);
  return files;
}

class Folder {
 public:
  Folder() {
    char path[] = "/tmp/qianmo_XXXXXX";
    CHECK(mkdtemp(path) != nullptr);
    path_ = path;
  }
  ~Folder() { std::filesystem::remove_all(path_); }

  void Write(const std::string& name, const std::string& bytes) const {
    // A new file: an old one may be mapped.
    std::filesystem::remove(path_ + "/" + name);
    std::ofstream(path_ + "/" + name, std::ios::binary) << bytes;
  }
  void Write(const Files& files) const {
    for (const auto& [name, bytes] : files) Write(name, bytes);
  }
  void Remove(const std::string& name) const {
    std::filesystem::remove(path_ + "/" + name);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Reads every row and some that are not there; whether all are as written.
bool ReadsRight(const MappedVersion& version) {
  const EmbeddingTable* const dense = version.table("d");
  const EmbeddingTable* const hashed = version.table("h");
  if (dense == nullptr || hashed == nullptr || dense->dim() != kDim ||
      hashed->dim() != kDim) {
    return false;
  }
  std::vector<int64_t> rows(kRows + 20), ids(kRows + 20);
  for (int64_t r = 0; r < kRows + 20; ++r) {
    rows[r] = r;
    ids[r] = IdOf(r);
  }
  rows[kRows + 1] = -1;
  rows[kRows + 2] = std::numeric_limits<int64_t>::max();
  rows[kRows + 3] = std::numeric_limits<int64_t>::min();
  const float absent[kDim] = {-5, -6, -7};
  bool right = true;
  for (const auto& [table, used] : {std::pair{dense, &rows}, {hashed, &ids}}) {
    std::vector<float> found(used->size() * kDim, NAN);
    CHECK(table->Gather(used->data(), used->size(), absent, found.data()) ==
          used->size());
    for (int64_t r = 0; r < kRows + 20; ++r) {
      const bool changed = used == &rows && (r == 10 || r == 11 || r == 149);
      for (int j = 0; j < kDim; ++j) {
        const float expected =
            r < kRows ? Value(changed ? 2 * r : r, j) : absent[j];
        right = right && found[r * kDim + j] == expected;
      }
    }
    const int64_t length = 100;
    table->Pool(used->data(), &length, nullptr, 1, used->size(), Pooling::kMean,
                absent, found.data());
    right =
        right && std::abs(found[0] - (used == &rows ? 49.71f : 49.5f)) < 1e-3f;
  }
  return right;
}

void ReadsWhatWasWritten() {
  const Folder folder;
  folder.Write(Version());
  std::string error;
  const auto version = MappedVersion::Open(folder.path(), &error);
  CHECK(version != nullptr);
  CHECK(version->version() == 7);
  CHECK(version->space() == 5);
  CHECK(version->Verify(&error));
  CHECK(ReadsRight(*version));
  CHECK(version->table("none") == nullptr);
  const int64_t added = 300;
  float vector[kDim];
  CHECK(version->table("d")->Gather(&added, 1, nullptr, vector) == 1);
  CHECK(vector[0] == Value(600, 0));
  CHECK(version->table("h")->default_vector()[0] == Value(0, 0));
  // Without a replacement the first id that has no row ends the work.
  const int64_t ids[] = {3, 4, 150, 5};
  float out[4 * kDim];
  CHECK(version->table("d")->Gather(ids, 4, nullptr, out) == 2);
  const int64_t lengths[] = {2, 1};
  CHECK(version->table("d")->Pool(ids, lengths, nullptr, 2, 2, Pooling::kMax,
                                  nullptr, out) == 1);
}

void WeightsCount() {
  const Folder folder;
  folder.Write(Version());
  std::string error;
  const auto version = MappedVersion::Open(folder.path(), &error);
  const int64_t ids[] = {1, 2, 4, 8, 5, 6, 7, 9};
  const int64_t lengths[] = {3, 2};
  const float weights[] = {2, 3, -1, NAN, 1, -1, NAN, NAN};
  const std::pair<Pooling, float> expected[] = {
      {Pooling::kMean, (2 * 1 + 3 * 2 - 1 * 4) / 4.0f},
      {Pooling::kSum, 2 * 1 + 3 * 2 - 1 * 4},
      {Pooling::kSqrtn, (2 * 1 + 3 * 2 - 1 * 4) / std::sqrt(4.0f + 9 + 1)},
  };
  for (const auto& [how, value] : expected) {
    float out[2 * kDim];
    CHECK(version->table("d")->Pool(ids, lengths, weights, 2, 4, how, nullptr,
                                    out) == 2);
    CHECK(std::abs(out[0] - value) < 1e-6f);
    // Weights that cancel out have no mean.
    if (how == Pooling::kMean) CHECK(out[kDim] == 0);
  }
}

void AWaitForTheDiskIsRemembered() {
  const Folder folder;
  folder.Write(Version());
  std::string error;
  const auto version = MappedVersion::Open(folder.path(), &error);
  for (const bool waited : {false, true}) {
    version->NoteReading(waited);
    CHECK(!version->IsInMemory());
    for (int i = 0; i < 1000; ++i) version->NoteReading(false);
    CHECK(version->IsInMemory());
  }
}

void ChecksumIsThatOfZlib() {
  CHECK(Crc32("123456789", 9) == 0xcbf43926u);
  CHECK(Crc32("56789", 5, Crc32("1234", 4)) == 0xcbf43926u);
}

std::string Refusal(const Folder& folder) {
  std::string error;
  const auto version = MappedVersion::Open(folder.path(), &error);
  if (version != nullptr) CHECK(!version->Verify(&error));
  return error;
}

void RefusalsNameTheFileAndTheFault() {
  const Files good = Version();
  const auto refusal = [&good](const std::string& name, auto change) {
    const Folder folder;
    Files files = good;
    change(&files[name]);
    folder.Write(files);
    const std::string error = Refusal(folder);
    CHECK(error.rfind(folder.path() + "/" + name + ": ", 0) == 0);
    return error.substr(folder.path().size() + name.size() + 3);
  };
  const std::string kShard = "d-1.rows";
  CHECK(refusal(kShard, [](std::string* f) { f->pop_back(); }) ==
        "it has 4863 bytes and the manifest says 4864");
  CHECK(refusal(kShard, [](std::string* f) { f->clear(); }) == "it is empty");
  CHECK(refusal(kShard, [](std::string* f) { (*f)[0] = 'X'; }) ==
        "it is no shard of an embedding table");
  CHECK(refusal(kShard, [](std::string* f) { (*f)[4000] = 'X'; }) ==
        "the checksum of its header differs");
  CHECK(refusal(kShard, [](std::string* f) { (*f)[4100] ^= 1; }) ==
        "the checksum of its rows differs; it was changed or damaged");
  CHECK(refusal(kShard, [&good](std::string* f) {
          *f = good.at("d-0.rows");
        }) == "its header is not of the shard that the manifest describes");
  CHECK(refusal("h-0.rows", [](std::string* f) {
          Set(f, 56, uint64_t{1} << 60);  // num_slots
          Seal(f);
        }) == "the sizes in its header do not agree");
  CHECK(refusal("MANIFEST", [](std::string* f) { *f = "{}"; }) ==
        "it is no manifest of an embedding version");
  CHECK(refusal("MANIFEST", [](std::string* f) { (*f)[18] = '2'; }) ==
        "its format is not 1, which is all that this program reads");
  CHECK(refusal("MANIFEST", [](std::string* f) { f->resize(100); }) ==
        "it does not end with a line of its checksum; it is cut off");
  CHECK(refusal("MANIFEST", [](std::string* f) { (*f)[40] ^= 1; }) ==
        "its checksum differs; it was changed or damaged");
  CHECK(refusal("MANIFEST", [](std::string* f) {
          *f = Sealed("qianmo embeddings 1\n");
        }) == "line 2 should be `version NUMBER space NUMBER`");
  const Folder folder;
  CHECK(Refusal(folder).find("/MANIFEST: No such file") != std::string::npos);
  folder.Write(good);
  folder.Remove("h-1.rows");
  CHECK(Refusal(folder).find("/h-1.rows: No such file") != std::string::npos);
}

// A manifest with right checksums that says what is not so.
void ManifestsThatLieAreRefused() {
  const std::string good = Version().at("MANIFEST");
  const std::string lines = good.substr(0, good.size() - 13);
  const std::pair<std::string, std::string> changes[] = {
      {"version 7", "version 07"},
      {"version 7", "version 9999999999999999999"},
      {"version 7", "version -7"},
      {"version 7 space 5", "version 7"},
      {"space 5", "space 0"},
      {"space 5", "space 8"},
      {"table h", "table d"},
      {"table h", "table h\ntable h"},
      {"table d", "table ../d"},
      {"shard d-0.rows", "shard ../d-0.rows"},
      {"shard d-0.rows", "shard  d-0.rows"},
      {"shard d-0.rows", "shard d-1.rows"},
      {"rows 150 default 0", "rows 0 default 0"},
      {"rows 150 default 0", "rows 151 default 0"},
      {"rows 150 default 0", "rows 149 default 0"},
      {"rows 150 default 0", "rows 1099511627776 default 0"},
      {"default 0", "default 150"},
      {"default -1", "default -2"},
      {"shard_rows 64", "shard_rows 63"},
      {"shard_rows 64", "shard_rows 128"},
      {"shard_rows 64", "shard_rows 0"},
      {"shard_rows 0", "shard_rows 64"},
      {"dim 3", "dim 4"},
      {"dim 3", "dim 0"},
      {"dim 3", "dim 65537"},
      {"float32", "float64"},
      {"float32", "float16"},
      {"dense", "hash"},
      {"bytes 4864", "bytes 4865"},
      {"bytes 4864", "bytes 18446744073709551615"},
      {"shard h-1.rows", "table h-1.rows"},
      {"changed d-changed.rows", "changed h-0.rows"},
      {"changed d-changed.rows", "changed d-0.rows"},
      {"changed d-changed.rows", "changed ../d-changed.rows"},
      {"changed d-changed.rows", "shard d-changed.rows"},
  };
  for (const auto& [from, to] : changes) {
    std::string changed = lines;
    CHECK(changed.find(from) != std::string::npos);
    changed.replace(changed.find(from), from.size(), to);
    const Folder folder;
    folder.Write(Version());
    folder.Write("MANIFEST", Sealed(changed));
    std::string error;
    const bool refused = MappedVersion::Open(folder.path(), &error) == nullptr;
    if (!refused) std::fprintf(stderr, "%s\n", to.c_str());
    CHECK(refused);
    CHECK(error.find(folder.path()) == 0);
  }
}

// Damaged files are refused at open or by Verify, or every row is right. With
// `sealed` the checksums of headers and manifests fit the damage: nothing but
// the bounds protects the reader then, and rows may differ.
void Fuzz(int count, bool sealed) {
  const Files good = Version();
  std::vector<std::string> names;
  for (const auto& [name, bytes] : good) names.push_back(name);
  const Folder folder;
  folder.Write(good);
  std::mt19937_64 random(sealed ? 2 : 1);
  int refused = 0, damaged_rows = 0;
  for (int i = 0; i < count; ++i) {
    const std::string& name = names[random() % names.size()];
    std::string bytes = good.at(name);
    // Half of the damage where the numbers stand.
    const size_t range =
        random() % 2 ? bytes.size() : std::min<size_t>(bytes.size(), 144);
    const size_t at = random() % range;
    switch (random() % 7) {
      case 0:
        bytes.resize(at);
        break;
      case 1:
        bytes.append(1 + random() % 5000, static_cast<char>(random()));
        break;
      case 2:
        bytes = good.at(names[random() % names.size()]);
        break;
      case 3:
        for (size_t j = at; j < std::min(bytes.size(), at + 16); ++j) {
          bytes[j] = static_cast<char>(random());
        }
        break;
      case 4: {
        const uint64_t extremes[] = {
            0,    ~uint64_t{0}, uint64_t{1} << 63, uint64_t{1} << 32,
            4096, bytes.size()};
        if (at + 8 <= bytes.size()) Set(&bytes, at / 8 * 8, extremes[i % 6]);
        break;
      }
      default:
        bytes[at] = static_cast<char>(bytes[at] ^ 1 << random() % 8);
    }
    if (sealed) {
      if (name == "MANIFEST") {
        const size_t end = bytes.rfind("\ncrc ");
        if (end != std::string::npos) bytes = Sealed(bytes.substr(0, end + 1));
      } else {
        Seal(&bytes);
      }
    }
    folder.Write(name, bytes);
    std::string error;
    const auto version = MappedVersion::Open(folder.path(), &error);
    if (version == nullptr) {
      CHECK(error.find(folder.path()) == 0);
      ++refused;
    } else if (!ReadsRight(*version)) {  // must not crash, whatever it reads
      CHECK(sealed || !version->Verify(&error));
      ++damaged_rows;
    }
    folder.Write(name, good.at(name));
  }
  CHECK(refused > count / 2);
  CHECK(damaged_rows > 0);
}

void Run() {
  ChecksumIsThatOfZlib();
  ReadsWhatWasWritten();
  WeightsCount();
  AWaitForTheDiskIsRemembered();
  RefusalsNameTheFileAndTheFault();
  ManifestsThatLieAreRefused();
  Fuzz(1000, /*sealed=*/false);
  Fuzz(1000, /*sealed=*/true);
}

}  // namespace
}  // namespace qianmo

int main() { qianmo::Run(); }
