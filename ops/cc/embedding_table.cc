#include "ops/cc/embedding_table.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <type_traits>

namespace qianmo {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "rows are little-endian");

constexpr uint64_t kMaxDim = 1 << 16;
constexpr size_t kMaxName = 63;
constexpr int64_t kCalmReadings = 1000;

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

bool IsName(const std::string& word, const char* also) {
  if (word.empty() || word[0] == '.') return false;
  return std::all_of(word.begin(), word.end(), [also](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           (c >= '0' && c <= '9') || c == '_' ||
           (c != 0 && std::strchr(also, c) != nullptr);
  });
}

bool ParseManifest(const std::string& manifest,
                   std::vector<std::vector<std::string>>* lines,
                   int64_t* version, int64_t* space, std::string* error) {
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
  for (size_t at = 0; at <= end;) {
    const size_t next = manifest.find('\n', at);
    lines->push_back(Words(manifest.substr(at, next - at)));
    at = next + 1;
  }
  const auto of = lines->size() > 1 ? (*lines)[1] : std::vector<std::string>();
  uint64_t number, of_space;
  if (of.size() != 4 || of[0] != "version" ||
      !ParseNumber(of[1], std::numeric_limits<int64_t>::max(), &number) ||
      of[2] != "space" || !ParseNumber(of[3], number, &of_space) ||
      of_space == 0) {
    return refuse("line 2 should be `version NUMBER space NUMBER`");
  }
  *version = static_cast<int64_t>(number);
  *space = static_cast<int64_t>(of_space);
  return true;
}

bool TableLayout::Parse(const std::vector<std::string>& w) {
  uint64_t width;
  if (w.size() != 12 || w[0] != "table" || !IsName(w[1], "") ||
      w[1].size() > kMaxName || (w[2] != "dense" && w[2] != "hash") ||
      RowTypes().count(w[3]) == 0 || w[4] != "dim" ||
      !ParseNumber(w[5], kMaxDim, &width) || width == 0 || w[6] != "rows" ||
      !ParseNumber(w[7], kMaxRows, &num_rows) || num_rows == 0 ||
      w[8] != "default" || !ParseId(w[9], &default_id) ||
      w[10] != "shard_rows" || !ParseNumber(w[11], kMaxRows, &shard_rows)) {
    return false;
  }
  name = w[1];
  hashed = w[2] == "hash";
  type = RowTypes().at(w[3]);
  dim = static_cast<uint32_t>(width);
  row_bytes = RowBytes(type, width);
  return true;
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
  const uint32_t dim = layout_.dim;
  return ForEachRow(ids, n, [&](size_t i, const char* row) {
    float* const to = out + i * dim;
    if (row != nullptr) {
      Decode<kType>(row, dim, to);
    } else if (absent != nullptr) {
      std::memcpy(to, absent, 4 * size_t{dim});
    } else {
      return false;
    }
    return true;
  });
}

size_t EmbeddingTable::Gather(const int64_t* ids, size_t n, const float* absent,
                              float* out) const {
  return WithType(layout_.type, [&](auto type) {
    return GatherAs<decltype(type)::value>(ids, n, absent, out);
  });
}

template <RowType kType>
size_t EmbeddingTable::PoolAs(const int64_t* ids, const int64_t* lengths,
                              const float* weights, size_t n, size_t width,
                              Pooling how, const float* absent,
                              float* out) const {
  const uint32_t dim = layout_.dim;
  std::fill(out, out + n * dim, 0.0f);
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
        float* const to = out + last * dim;
        const auto add = [to, weight](uint32_t j, float v) {
          to[j] += weight * v;
        };
        const auto raise = [to, first](uint32_t j, float v) {
          to[j] = first ? v : std::max(to[j], v);
        };
        const auto each = [&](auto use) {
          if (row != nullptr) {
            EachValue<kType>(row, dim, use);
          } else {
            for (uint32_t j = 0; j < dim; ++j) use(j, absent[j]);
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
    for (uint32_t j = 0; j < dim; ++j) {
      float& value = out[i * dim + j];
      value = by == 0 ? 0 : value / by;
    }
  }
  return n;
}

size_t EmbeddingTable::Pool(const int64_t* ids, const int64_t* lengths,
                            const float* weights, size_t n, size_t width,
                            Pooling how, const float* absent,
                            float* out) const {
  return WithType(layout_.type, [&](auto type) {
    return PoolAs<decltype(type)::value>(ids, lengths, weights, n, width, how,
                                         absent, out);
  });
}

bool EmbeddingTable::ReadDefault() {
  default_vector_.resize(layout_.dim);
  return Gather(&layout_.default_id, 1, nullptr, default_vector_.data()) == 1;
}

std::shared_ptr<const EmbeddingVersion> EmbeddingVersion::Fetch(
    const std::vector<WantedIds>&, std::string* error) const {
  *error = where_ + ": its rows need not be fetched";
  return nullptr;
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

}  // namespace qianmo
