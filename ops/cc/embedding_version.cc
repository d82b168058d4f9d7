#include "ops/cc/embedding_version.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

namespace qianmo {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "the files are little-endian");

constexpr char kMagic[8] = {'Q', 'M', 'R', 'O', 'W', 'S', '1', '\n'};
constexpr uint64_t kHeaderBytes = 4096;
constexpr uint64_t kMaxManifestBytes = 64 << 20;
constexpr uint64_t kMaxDim = 1 << 16;
constexpr uint64_t kMaxRows = uint64_t{1} << 40;
constexpr uint64_t kMaxTail = 1 << 16;
constexpr uint64_t kChanged = ~uint32_t{0};  // number of that shard
constexpr int64_t kCalmReadings = 1000;
constexpr size_t kBlock = 64;  // ids whose rows are asked for together
constexpr uint64_t kLine = 64;

// The start of a shard's file. Up to its last four bytes, which are the
// checksum of those before, the rest of kHeaderBytes is zero.
struct Header {
  char magic[8];
  uint32_t row_type;
  uint32_t hashed;
  uint32_t dim;
  uint32_t data_crc;
  uint64_t shard;
  uint64_t num_rows;
  uint64_t row_bytes;
  uint64_t home_slots;
  uint64_t num_slots;
  uint64_t rows_offset;
  uint64_t file_bytes;
  char table[64];
};
static_assert(sizeof(Header) == 144);

const std::map<std::string, RowType>& RowTypes() {
  static const auto* const types = new std::map<std::string, RowType>{
      {"float32", RowType::kFloat32},
      {"float16", RowType::kFloat16},
      {"bfloat16", RowType::kBfloat16},
      {"int8", RowType::kInt8},
  };
  return *types;
}

uint64_t RowBytes(RowType type, uint64_t dim) {
  uint64_t bytes = 0;
  switch (type) {
    case RowType::kFloat32:
      bytes = 4 * dim;
      break;
    case RowType::kFloat16:
    case RowType::kBfloat16:
      bytes = 2 * dim;
      break;
    case RowType::kInt8:
      bytes = 4 + dim;
      break;
  }
  return (bytes + 3) / 4 * 4;
}

uint64_t AlignToPage(uint64_t bytes) {
  return (bytes + kHeaderBytes - 1) / kHeaderBytes * kHeaderBytes;
}

bool IsPowerOfTwo(uint64_t x) { return x != 0 && (x & (x - 1)) == 0; }

template <typename To, typename From>
To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

float FromHalf(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t rest = (half & 0x7fffu) << 13;
  // Subnormal halfs are normal floats: a difference of two floats makes them,
  // and denormal flushing, which TensorFlow turns on, does not harm them.
  const uint32_t normal = rest + (112u << 23);
  const uint32_t subnormal = BitCast<uint32_t>(
      BitCast<float>(rest + (113u << 23)) - BitCast<float>(113u << 23));
  const uint32_t infinite = rest | (255u << 23);
  const uint32_t exponent = half & 0x7c00u;
  return BitCast<float>(sign | (exponent == 0         ? subnormal
                                : exponent == 0x7c00u ? infinite
                                                      : normal));
}

// Calls use(j, value) for each number of a row.
template <RowType kType, typename Use>
inline void EachValue(const char* row, uint32_t dim, Use use) {
  if constexpr (kType == RowType::kFloat32) {
    for (uint32_t j = 0; j < dim; ++j) {
      float value;
      std::memcpy(&value, row + 4 * size_t{j}, 4);
      use(j, value);
    }
  } else if constexpr (kType == RowType::kInt8) {
    float scale;
    std::memcpy(&scale, row, 4);
    const auto* const numbers = reinterpret_cast<const int8_t*>(row + 4);
    for (uint32_t j = 0; j < dim; ++j) use(j, scale * numbers[j]);
  } else {
    for (uint32_t j = 0; j < dim; ++j) {
      uint16_t bits;
      std::memcpy(&bits, row + 2 * size_t{j}, 2);
      use(j, kType == RowType::kFloat16 ? FromHalf(bits)
                                        : BitCast<float>(uint32_t{bits} << 16));
    }
  }
}

template <RowType kType>
inline void Decode(const char* row, uint32_t dim, float* out) {
  if constexpr (kType == RowType::kFloat32) {
    std::memcpy(out, row, 4 * size_t{dim});
  } else {
    EachValue<kType>(row, dim, [out](uint32_t j, float v) { out[j] = v; });
  }
}

// Calls use(std::integral_constant<RowType, type>()).
template <typename Use>
auto WithType(RowType type, Use use) {
  switch (type) {
    case RowType::kFloat16:
      return use(std::integral_constant<RowType, RowType::kFloat16>());
    case RowType::kBfloat16:
      return use(std::integral_constant<RowType, RowType::kBfloat16>());
    case RowType::kInt8:
      return use(std::integral_constant<RowType, RowType::kInt8>());
    case RowType::kFloat32:
      break;
  }
  return use(std::integral_constant<RowType, RowType::kFloat32>());
}

bool Fail(std::string* error, const std::string& path,
          const std::string& what) {
  *error = path + ": " + what;
  return false;
}

// Words of a line, separated by single spaces.
std::vector<std::string> Words(const std::string& line) {
  std::vector<std::string> words(1);
  for (const char c : line) {
    if (c == ' ') {
      words.emplace_back();
    } else {
      words.back() += c;
    }
  }
  return words;
}

bool ParseNumber(const std::string& word, uint64_t most, uint64_t* number) {
  if (word.empty() || word.size() > 19 || (word[0] == '0' && word.size() > 1)) {
    return false;
  }
  *number = 0;
  for (const char c : word) {
    if (c < '0' || c > '9') return false;
    *number = *number * 10 + static_cast<uint64_t>(c - '0');
  }
  return *number <= most;
}

bool ParseId(const std::string& word, int64_t* id) {
  const bool negative = !word.empty() && word[0] == '-';
  uint64_t size;
  if (!ParseNumber(word.substr(negative ? 1 : 0),
                   std::numeric_limits<int64_t>::max(), &size)) {
    return false;
  }
  *id = negative ? -static_cast<int64_t>(size) : static_cast<int64_t>(size);
  return true;
}

bool ParseCrc(const std::string& word, uint32_t* crc) {
  if (word.size() != 8) return false;
  *crc = 0;
  for (const char c : word) {
    const char* const digits = "0123456789abcdef";
    const char* const digit = c == 0 ? nullptr : std::strchr(digits, c);
    if (digit == nullptr) return false;
    *crc = *crc << 4 | static_cast<uint32_t>(digit - digits);
  }
  return true;
}

// Letters, digits, `_`, and in files' names `.` and `-`: never a path.
bool IsName(const std::string& word, const char* also) {
  if (word.empty() || word[0] == '.') return false;
  return std::all_of(word.begin(), word.end(), [also](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           (c >= '0' && c <= '9') || c == '_' ||
           (c != 0 && std::strchr(also, c) != nullptr);
  });
}

// A line `shard FILE rows N bytes N crc CRC`, whatever its first word.
bool ParseShard(const std::vector<std::string>& words,
                const std::string& folder, Shard* shard) {
  if (words.size() != 8 || !IsName(words[1], ".-") || words[2] != "rows" ||
      !ParseNumber(words[3], kMaxRows, &shard->num_rows) ||
      words[4] != "bytes" ||
      !ParseNumber(words[5], uint64_t{1} << 60, &shard->bytes) ||
      words[6] != "crc" || !ParseCrc(words[7], &shard->crc)) {
    return false;
  }
  shard->path = folder + "/" + words[1];
  return true;
}

struct CrcTables {
  std::array<std::array<uint32_t, 256>, 8> of;
  CrcTables() {
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t crc = i;
      for (int bit = 0; bit < 8; ++bit) {
        crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
      }
      of[0][i] = crc;
    }
    for (size_t k = 1; k < 8; ++k) {
      for (size_t i = 0; i < 256; ++i) {
        of[k][i] = of[k - 1][i] >> 8 ^ of[0][of[k - 1][i] & 255];
      }
    }
  }
};

}  // namespace

uint32_t Crc32(const void* data, size_t size, uint32_t crc) {
  static const CrcTables* const tables = new CrcTables;
  const auto& t = tables->of;
  const auto* p = static_cast<const unsigned char*>(data);
  crc = ~crc;
  for (; size >= 8; size -= 8, p += 8) {
    uint64_t word;
    std::memcpy(&word, p, 8);
    word ^= crc;
    crc = t[7][word & 255] ^ t[6][word >> 8 & 255] ^ t[5][word >> 16 & 255] ^
          t[4][word >> 24 & 255] ^ t[3][word >> 32 & 255] ^
          t[2][word >> 40 & 255] ^ t[1][word >> 48 & 255] ^ t[0][word >> 56];
  }
  for (; size > 0; --size, ++p) crc = crc >> 8 ^ t[0][(crc ^ *p) & 255];
  return ~crc;
}

uint64_t HashId(int64_t id) {
  auto h = static_cast<uint64_t>(id);
  h = (h ^ h >> 33) * 0xff51afd7ed558ccdu;
  h = (h ^ h >> 33) * 0xc4ceb9fe1a85ec53u;
  return h ^ h >> 33;
}

std::unique_ptr<MappedFile> MappedFile::Open(const std::string& path,
                                             std::string* error) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    Fail(error, path, std::strerror(errno));
    return nullptr;
  }
  struct stat info;
  void* data = MAP_FAILED;
  std::string what = "it is no file";
  if (fstat(fd, &info) == 0 && S_ISREG(info.st_mode)) {
    what = "it is empty";
    if (info.st_size > 0) {
      data = mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ,
                  MAP_SHARED, fd, 0);
      if (data == MAP_FAILED) what = std::strerror(errno);
    }
  }
  close(fd);  // the mapping stays
  if (data == MAP_FAILED) {
    Fail(error, path, what);
    return nullptr;
  }
  return std::unique_ptr<MappedFile>(new MappedFile(
      static_cast<const char*>(data), static_cast<uint64_t>(info.st_size)));
}

MappedFile::~MappedFile() { munmap(const_cast<char*>(data_), size_); }

void EmbeddingTable::Prefetch(const char* row) const {
  for (uint64_t at = 0; at < std::min(row_bytes_, 8 * kLine); at += kLine) {
    __builtin_prefetch(row + at);
  }
  if (row_bytes_ % kLine != 0) __builtin_prefetch(row + row_bytes_ - 1);
}

void EmbeddingTable::FindDense(const int64_t* ids, size_t n,
                               const char** rows) const {
  const uint64_t mask = (uint64_t{1} << shift_) - 1;
  for (size_t i = 0; i < n; ++i) {
    const auto id = static_cast<uint64_t>(ids[i]);
    rows[i] = nullptr;
    if (id >= num_rows_) continue;
    rows[i] = shards_[id >> shift_].rows + (id & mask) * row_bytes_;
    Prefetch(rows[i]);
  }
}

void EmbeddingTable::FindHashed(const Shard* all, int shift, const int64_t* ids,
                                size_t n, const char** rows) const {
  const Shard* shards[kBlock];
  const Slot* homes[kBlock];
  for (size_t i = 0; i < n; ++i) {
    const uint64_t hash = HashId(ids[i]);
    // Two shifts: a shift by all 64 bits is not defined.
    shards[i] = &all[hash >> 1 >> (shift - 1)];
    homes[i] = shards[i]->slots + (hash & shards[i]->home_mask);
    __builtin_prefetch(homes[i]);
  }
  for (size_t i = 0; i < n; ++i) {
    const Shard& shard = *shards[i];
    rows[i] = nullptr;
    for (const Slot* slot = homes[i]; slot <= homes[i] + shard.tail; ++slot) {
      if (slot->row == Slot::kNoRow) break;
      if (slot->id != ids[i]) continue;
      if (slot->row < shard.num_rows) {
        rows[i] = shard.rows + slot->row * row_bytes_;
        Prefetch(rows[i]);
      }
      break;
    }
  }
}

void EmbeddingTable::Find(const int64_t* ids, size_t n,
                          const char** rows) const {
  if (hashed_) {
    FindHashed(shards_.data(), shift_, ids, n, rows);
  } else {
    FindDense(ids, n, rows);
  }
  if (changed_.slots == nullptr) return;
  const char* changed[kBlock];
  FindHashed(&changed_, 64, ids, n, changed);
  for (size_t i = 0; i < n; ++i) {
    if (changed[i] != nullptr) rows[i] = changed[i];
  }
}

template <typename Consume>
size_t EmbeddingTable::ForEachRow(const int64_t* ids, size_t n,
                                  Consume consume) const {
  // The rows of the next block travel while those of this one are used.
  const char* rows[2][kBlock];
  Find(ids, std::min(n, kBlock), rows[0]);
  for (size_t begin = 0, turn = 0; begin < n; begin += kBlock, turn ^= 1) {
    const size_t end = std::min(n, begin + kBlock);
    if (end < n) Find(ids + end, std::min(n - end, kBlock), rows[turn ^ 1]);
    for (size_t i = begin; i < end; ++i) {
      if (!consume(i, rows[turn][i - begin])) return i;
    }
  }
  return n;
}

template <RowType kType>
size_t EmbeddingTable::GatherAs(const int64_t* ids, size_t n,
                                const float* absent, float* out) const {
  return ForEachRow(ids, n, [&](size_t i, const char* row) {
    float* const to = out + i * dim_;
    if (row != nullptr) {
      Decode<kType>(row, dim_, to);
    } else if (absent != nullptr) {
      std::memcpy(to, absent, 4 * size_t{dim_});
    } else {
      return false;
    }
    return true;
  });
}

size_t EmbeddingTable::Gather(const int64_t* ids, size_t n, const float* absent,
                              float* out) const {
  return WithType(type_, [&](auto type) {
    return GatherAs<decltype(type)::value>(ids, n, absent, out);
  });
}

template <RowType kType>
size_t EmbeddingTable::PoolAs(const int64_t* ids, const int64_t* lengths,
                              const float* weights, size_t n, size_t width,
                              Pooling how, const float* absent,
                              float* out) const {
  std::fill(out, out + n * dim_, 0.0f);
  struct Place {
    size_t row;
    float weight;
  };
  std::vector<int64_t> used;  // the ids within the lengths, rows joined
  std::vector<Place> places;  // where each one goes
  std::vector<float> divisors(n, 0.0f);
  for (size_t i = 0; i < n; ++i) {
    const auto count = static_cast<size_t>(
        std::clamp<int64_t>(lengths[i], 0, static_cast<int64_t>(width)));
    for (size_t at = i * width; at < i * width + count; ++at) {
      const float weight = weights == nullptr ? 1.0f : weights[at];
      used.push_back(ids[at]);
      places.push_back({i, weight});
      divisors[i] += how == Pooling::kSqrtn ? weight * weight : weight;
    }
  }
  size_t last = n;  // the row of the id before
  const size_t done =
      ForEachRow(used.data(), used.size(), [&](size_t i, const char* row) {
        if (row == nullptr && absent == nullptr) return false;
        const float weight = places[i].weight;
        const bool first = places[i].row != last;
        last = places[i].row;
        float* const to = out + last * dim_;
        const auto add = [to, weight](uint32_t j, float v) {
          to[j] += weight * v;
        };
        const auto raise = [to, first](uint32_t j, float v) {
          to[j] = first ? v : std::max(to[j], v);
        };
        const auto each = [&](auto use) {
          if (row != nullptr) {
            EachValue<kType>(row, dim_, use);
          } else {
            for (uint32_t j = 0; j < dim_; ++j) use(j, absent[j]);
          }
        };
        if (how == Pooling::kMax) {
          each(raise);
        } else {
          each(add);
        }
        return true;
      });
  if (done < used.size()) return places[done].row;
  if (how == Pooling::kSum || how == Pooling::kMax) return n;
  for (size_t i = 0; i < n; ++i) {
    const float by =
        how == Pooling::kSqrtn ? std::sqrt(divisors[i]) : divisors[i];
    for (uint32_t j = 0; j < dim_; ++j) {
      float& value = out[i * dim_ + j];
      value = by == 0 ? 0 : value / by;
    }
  }
  return n;
}

size_t EmbeddingTable::Pool(const int64_t* ids, const int64_t* lengths,
                            const float* weights, size_t n, size_t width,
                            Pooling how, const float* absent,
                            float* out) const {
  return WithType(type_, [&](auto type) {
    return PoolAs<decltype(type)::value>(ids, lengths, weights, n, width, how,
                                         absent, out);
  });
}

std::shared_ptr<const EmbeddingVersion> EmbeddingVersion::Open(
    const std::string& folder, std::string* error) {
  const std::string path = folder + "/MANIFEST";
  const auto file = MappedFile::Open(path, error);
  if (file == nullptr) return nullptr;
  if (file->size() > kMaxManifestBytes) {
    Fail(error, path, "it is too long for a manifest");
    return nullptr;
  }
  auto version = std::make_shared<EmbeddingVersion>();
  version->folder_ = folder;
  std::string what;
  if (!version->Parse(std::string(file->data(), file->size()), &what)) {
    // Errors of shards begin with their own path.
    *error = what[0] == '/' || what.rfind(folder, 0) == 0 ? what
                                                          : path + ": " + what;
    return nullptr;
  }
  return version;
}

bool EmbeddingVersion::Parse(const std::string& manifest, std::string* error) {
  const auto refuse = [error](const std::string& what) {
    *error = what;
    return false;
  };
  const std::string first = "qianmo embeddings ";
  if (manifest.rfind(first, 0) != 0) {
    return refuse("it is no manifest of an embedding version");
  }
  if (manifest.rfind(first + "1\n", 0) != 0) {
    return refuse("its format is not 1, which is all that this program reads");
  }
  const std::string last_word = "\ncrc ";
  const size_t end = manifest.rfind(last_word);
  uint32_t crc;
  if (end == std::string::npos || manifest.back() != '\n' ||
      !ParseCrc(manifest.substr(end + last_word.size(),
                                manifest.size() - end - last_word.size() - 1),
                &crc)) {
    return refuse("it does not end with a line of its checksum; it is cut off");
  }
  if (Crc32(manifest.data(), end + 1) != crc) {
    return refuse("its checksum differs; it was changed or damaged");
  }
  std::vector<std::vector<std::string>> lines;
  for (size_t at = 0; at <= end;) {
    const size_t next = manifest.find('\n', at);
    lines.push_back(Words(manifest.substr(at, next - at)));
    at = next + 1;
  }
  const auto& of = lines[1];
  uint64_t version, space;
  if (of.size() != 4 || of[0] != "version" ||
      !ParseNumber(of[1], std::numeric_limits<int64_t>::max(), &version) ||
      of[2] != "space" || !ParseNumber(of[3], version, &space) || space == 0) {
    return refuse("line 2 should be `version NUMBER space NUMBER`");
  }
  version_ = static_cast<int64_t>(version);
  space_ = static_cast<int64_t>(space);
  for (size_t i = 2; i < lines.size();) {
    const auto& w = lines[i];
    const std::string where = "line " + std::to_string(i + 1);
    EmbeddingTable table;
    uint64_t dim, shard_rows;
    if (w.size() != 12 || w[0] != "table" || !IsName(w[1], "") ||
        w[1].size() >= sizeof(Header::table) ||
        (w[2] != "dense" && w[2] != "hash") || RowTypes().count(w[3]) == 0 ||
        w[4] != "dim" || !ParseNumber(w[5], kMaxDim, &dim) || dim == 0 ||
        w[6] != "rows" || !ParseNumber(w[7], kMaxRows, &table.num_rows_) ||
        table.num_rows_ == 0 || w[8] != "default" ||
        !ParseId(w[9], &table.default_id_) || w[10] != "shard_rows" ||
        !ParseNumber(w[11], kMaxRows, &shard_rows)) {
      return refuse(where + " does not describe a table");
    }
    table.name_ = w[1];
    table.hashed_ = w[2] == "hash";
    table.type_ = RowTypes().at(w[3]);
    table.dim_ = static_cast<uint32_t>(dim);
    table.row_bytes_ = RowBytes(table.type_, dim);
    if (tables_.count(table.name_) != 0) {
      return refuse(where + " describes table `" + table.name_ + "` again");
    }
    uint64_t rows = 0;
    for (++i; i < lines.size() && lines[i][0] == "shard"; ++i) {
      Shard shard;
      if (!ParseShard(lines[i], folder_, &shard)) {
        return refuse("line " + std::to_string(i + 1) +
                      " does not describe a shard");
      }
      const uint64_t left = table.num_rows_ - rows;
      if (shard.num_rows > left ||
          (!table.hashed_ && shard.num_rows != std::min(shard_rows, left))) {
        return refuse("line " + std::to_string(i + 1) + ": " + lines[i][3] +
                      " rows do not fit its table");
      }
      rows += shard.num_rows;
      table.shards_.push_back(std::move(shard));
    }
    if (rows != table.num_rows_) {
      return refuse("the shards of table `" + table.name_ + "` have " +
                    std::to_string(rows) + " of its rows");
    }
    if (table.hashed_ ? !IsPowerOfTwo(table.shards_.size()) || shard_rows != 0
                      : !IsPowerOfTwo(shard_rows)) {
      return refuse(where + " has a number of shards, or shard_rows, that " +
                    "does not fit");
    }
    for (uint64_t n = table.hashed_ ? table.shards_.size() : shard_rows; n > 1;
         n /= 2) {
      ++table.shift_;
    }
    if (table.hashed_) table.shift_ = 64 - table.shift_;
    for (size_t k = 0; k < table.shards_.size(); ++k) {
      if (!OpenShard(table, k, table.hashed_, &table.shards_[k], error)) {
        return false;
      }
    }
    if (i < lines.size() && lines[i][0] == "changed") {
      if (!ParseShard(lines[i], folder_, &table.changed_)) {
        return refuse("line " + std::to_string(i + 1) +
                      " does not describe a shard");
      }
      ++i;
      if (!OpenShard(table, kChanged, true, &table.changed_, error)) {
        return false;
      }
    }
    if (!OpenTable(&table, error)) return false;
    tables_.emplace(table.name_, std::move(table));
  }
  return true;
}

bool EmbeddingVersion::OpenShard(const EmbeddingTable& table, uint64_t number,
                                 bool hashed, Shard* opened,
                                 std::string* error) {
  Shard& shard = *opened;
  const uint64_t bytes = shard.bytes;
  shard.file = MappedFile::Open(shard.path, error);
  if (shard.file == nullptr) return false;
  if (shard.file->size() != bytes) {
    return Fail(error, shard.path,
                "it has " + std::to_string(shard.file->size()) +
                    " bytes and the manifest says " + std::to_string(bytes));
  }
  const char* const data = shard.file->data();
  Header h;
  if (bytes < kHeaderBytes || std::memcmp(data, kMagic, sizeof(kMagic)) != 0) {
    return Fail(error, shard.path, "it is no shard of an embedding table");
  }
  uint32_t crc;
  std::memcpy(&crc, data + kHeaderBytes - 4, 4);
  if (Crc32(data, kHeaderBytes - 4) != crc) {
    return Fail(error, shard.path, "the checksum of its header differs");
  }
  std::memcpy(&h, data, sizeof(h));
  char name[sizeof(h.table)] = {};
  table.name_.copy(name, sizeof(name) - 1);
  if (std::memcmp(h.table, name, sizeof(name)) != 0 || h.shard != number ||
      h.row_type != static_cast<uint32_t>(table.type_) ||
      h.hashed != (hashed ? 1 : 0) || h.dim != table.dim_ ||
      h.num_rows != shard.num_rows || h.data_crc != shard.crc) {
    return Fail(error, shard.path,
                "its header is not of the shard that the manifest describes");
  }
  const bool slots_fit = hashed ? IsPowerOfTwo(h.home_slots) &&
                                      h.home_slots <= kMaxRows &&
                                      h.num_slots >= h.home_slots &&
                                      h.num_slots - h.home_slots <= kMaxTail
                                : h.home_slots == 0 && h.num_slots == 0;
  if (!slots_fit || h.row_bytes != table.row_bytes_ ||
      h.rows_offset != AlignToPage(kHeaderBytes + h.num_slots * sizeof(Slot)) ||
      h.file_bytes != h.rows_offset + h.num_rows * h.row_bytes ||
      h.file_bytes != bytes) {
    return Fail(error, shard.path, "the sizes in its header do not agree");
  }
  shard.rows = data + h.rows_offset;
  if (hashed) {
    shard.slots = reinterpret_cast<const Slot*>(data + kHeaderBytes);
    shard.home_mask = h.home_slots - 1;
    shard.tail = h.num_slots - h.home_slots;
  }
  return true;
}

bool EmbeddingVersion::OpenTable(EmbeddingTable* table, std::string* error) {
  table->default_vector_.resize(table->dim_);
  if (table->Gather(&table->default_id_, 1, nullptr,
                    table->default_vector_.data()) != 1) {
    *error = "table `" + table->name_ + "` has no row of its default id " +
             std::to_string(table->default_id_);
    return false;
  }
  return true;
}

const EmbeddingTable* EmbeddingVersion::table(const std::string& name) const {
  const auto found = tables_.find(name);
  return found == tables_.end() ? nullptr : &found->second;
}

void EmbeddingVersion::NoteReading(bool waited) const {
  if (waited) {
    readings_in_memory_.store(0, std::memory_order_relaxed);
  } else {
    readings_in_memory_.fetch_add(1, std::memory_order_relaxed);
  }
}

bool EmbeddingVersion::IsInMemory() const {
  return readings_in_memory_.load(std::memory_order_relaxed) >= kCalmReadings;
}

bool EmbeddingVersion::Verify(std::string* error) const {
  const auto verify = [error](const Shard& shard) {
    return Crc32(shard.file->data() + kHeaderBytes,
                 shard.file->size() - kHeaderBytes) == shard.crc ||
           Fail(error, shard.path,
                "the checksum of its rows differs; it was changed or damaged");
  };
  for (const auto& [name, table] : tables_) {
    for (const Shard& shard : table.shards_) {
      if (!verify(shard)) return false;
    }
    if (table.changed_.file != nullptr && !verify(table.changed_)) return false;
  }
  return true;
}

}  // namespace qianmo
