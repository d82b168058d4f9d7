// Fuzzes the files of an embedding version: MANIFEST and shards of any bytes
// either open, with what a plain reader finds in them, or are refused with an
// error that names the file.
//
// An input is an archive, a line "NAME SIZE" and SIZE bytes for each file. The
// mutator changes one file and then, mostly, makes checksums right again, as
// otherwise nothing behind them would be reached.

#include <sys/stat.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <sstream>
#include <vector>

#include "ops/cc/embedding_version.h"
#include "tests/fuzz/harness.h"

namespace qianmo::fuzz {
namespace {

using Files = std::map<std::string, std::string>;

constexpr size_t kHeader = 4096;
constexpr size_t kDataCrc = 20;  // place of the rows' checksum in a header

// An archive may end anywhere; what is left of it counts.
Files Unpack(const std::string& archive) {
  Files files;
  for (size_t at = 0; at < archive.size() && files.size() < 20;) {
    const size_t end = archive.find('\n', at);
    const size_t space = archive.find(' ', at);
    if (end == std::string::npos || space == std::string::npos || space > end) {
      break;
    }
    const std::string name = archive.substr(at, space - at);
    const size_t size = std::strtoull(archive.c_str() + space, nullptr, 10);
    if (name.empty() || name.size() > 100 || name[0] == '.' ||
        name.find('/') != std::string::npos ||
        name.find('\0') != std::string::npos) {
      break;
    }
    files[name] = archive.substr(end + 1, size);
    at = end + 1 + files[name].size();
  }
  return files;
}

std::string Pack(const Files& files) {
  std::string archive;
  for (const auto& [name, bytes] : files) {
    archive += name + " " + std::to_string(bytes.size()) + "\n" + bytes;
  }
  return archive;
}

// CRC-32 bit by bit, from its definition.
uint32_t PlainCrc(const char* data, size_t size) {
  uint32_t crc = ~0u;
  for (size_t i = 0; i < size; ++i) {
    crc ^= static_cast<uint8_t>(data[i]);
    for (int bit = 0; bit < 8; ++bit) {
      crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
  }
  return ~crc;
}

std::string Hex(uint32_t crc) {
  char text[9];
  std::snprintf(text, sizeof(text), "%08x", crc);
  return text;
}

std::vector<std::string> Split(const std::string& text, char by) {
  std::vector<std::string> parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, by);) parts.push_back(part);
  return parts;
}

// Makes the checksums right, and the sizes of files in the manifest.
void Seal(Files* files, bool rows) {
  std::string lines;
  for (std::string line : Split((*files)["MANIFEST"], '\n')) {
    if (line.rfind("crc ", 0) == 0) continue;
    auto words = Split(line, ' ');
    const auto file = words.size() == 8 ? files->find(words[1]) : files->end();
    if (file != files->end() && file->second.size() >= kHeader) {
      std::string& bytes = file->second;
      if (rows) {
        const uint32_t crc =
            Crc32(bytes.data() + kHeader, bytes.size() - kHeader);
        Store(crc, &bytes[kDataCrc]);
        words[7] = Hex(crc);
        words[5] = std::to_string(bytes.size());
        line = words[0];
        for (size_t i = 1; i < 8; ++i) line += " " + words[i];
      }
      Store(Crc32(bytes.data(), kHeader - 4), &bytes[kHeader - 4]);
    }
    lines += line + "\n";
  }
  (*files)["MANIFEST"] =
      lines + "crc " + Hex(Crc32(lines.data(), lines.size())) + "\n";
}

struct PlainShard {
  std::string bytes;
  uint64_t num_rows, home_slots, num_slots, rows_offset;
  uint32_t crc;
};

// The row of an id in a hashed shard, by the description in the header file.
const char* PlainFind(const PlainShard& shard, int64_t id, size_t row_bytes) {
  const uint64_t home = HashId(id) & (shard.home_slots - 1);
  for (uint64_t at = home; at <= home + shard.num_slots - shard.home_slots;
       ++at) {
    const char* const slot = shard.bytes.data() + kHeader + at * 16;
    const auto row = Load<uint64_t>(slot + 8);
    if (row == ~uint64_t{0}) return nullptr;
    if (Load<int64_t>(slot) != id) continue;
    if (row >= shard.num_rows) return nullptr;
    return shard.bytes.data() + shard.rows_offset + row * row_bytes;
  }
  return nullptr;
}

struct PlainTable {
  std::string name, type;
  bool hashed;
  size_t dim, row_bytes;
  uint64_t num_rows, shard_rows;
  std::vector<PlainShard> shards;
  std::optional<PlainShard> changed;

  const char* Find(int64_t id) const {
    if (changed) {
      if (const char* const row = PlainFind(*changed, id, row_bytes)) {
        return row;
      }
    }
    if (hashed) {
      uint64_t number = 0;  // the hash's top bits, as many as name a shard
      for (uint64_t n = 1, bit = 63; n < shards.size(); n *= 2, --bit) {
        number = number * 2 + (HashId(id) >> bit & 1);
      }
      return PlainFind(shards[number], id, row_bytes);
    }
    if (id < 0 || static_cast<uint64_t>(id) >= num_rows) return nullptr;
    const auto row = static_cast<uint64_t>(id);
    const PlainShard& shard = shards[row / shard_rows];
    return shard.bytes.data() + shard.rows_offset +
           row % shard_rows * row_bytes;
  }

  float Value(const char* row, size_t j) const {
    if (type == "float32") return Load<float>(row + 4 * j);
    if (type == "int8") {
      return Load<float>(row) * static_cast<float>(Load<int8_t>(row + 4 + j));
    }
    const auto bits = Load<uint16_t>(row + 2 * j);
    if (type == "bfloat16") {
      float value;
      const uint32_t wide = uint32_t{bits} << 16;
      std::memcpy(&value, &wide, 4);
      return value;
    }
    const int exponent = bits >> 10 & 31;
    const float fraction = static_cast<float>(bits & 1023);
    const float size = exponent == 31 ? (fraction == 0 ? INFINITY : NAN)
                       : exponent > 0
                           ? std::ldexp(1024 + fraction, exponent - 25)
                           : std::ldexp(fraction, -24);
    return bits & 0x8000 ? -size : size;
  }
};

// Reads a version that was opened, so that what is checked there holds.
std::vector<PlainTable> PlainRead(const Files& files) {
  std::vector<PlainTable> tables;
  const std::string& manifest = files.at("MANIFEST");
  const auto lines = Split(manifest, '\n');
  EXPECT(lines.at(0) == "qianmo embeddings 1", manifest);
  const size_t crc_line = manifest.size() - 13;
  EXPECT(manifest.substr(crc_line) ==
             "crc " + Hex(PlainCrc(manifest.data(), crc_line)) + "\n",
         manifest);
  for (size_t i = 2; i + 1 < lines.size(); ++i) {
    const auto w = Split(lines[i], ' ');
    if (w.at(0) == "table") {
      PlainTable table{w.at(1),
                       w.at(3),
                       w.at(2) == "hash",
                       std::stoull(w.at(5)),
                       0,
                       std::stoull(w.at(7)),
                       std::stoull(w.at(11)),
                       {},
                       {}};
      table.row_bytes = table.type == "float32" ? 4 * table.dim
                        : table.type == "int8"  ? 4 + table.dim
                                                : 2 * table.dim;
      table.row_bytes = (table.row_bytes + 3) / 4 * 4;
      tables.push_back(table);
      continue;
    }
    EXPECT(w.at(0) == "shard" || w.at(0) == "changed", lines[i]);
    const std::string& bytes = files.at(w.at(1));
    EXPECT(bytes.size() == std::stoull(w.at(5)), lines[i]);
    const char* const h = bytes.data();
    EXPECT(Load<uint32_t>(h + kHeader - 4) == PlainCrc(h, kHeader - 4), w[1]);
    PlainShard shard{bytes,
                     Load<uint64_t>(h + 32),
                     Load<uint64_t>(h + 48),
                     Load<uint64_t>(h + 56),
                     Load<uint64_t>(h + 64),
                     static_cast<uint32_t>(std::stoul(w.at(7), nullptr, 16))};
    EXPECT(shard.num_rows == std::stoull(w.at(3)), lines[i]);
    EXPECT(shard.rows_offset + shard.num_rows * tables.back().row_bytes ==
               bytes.size(),
           lines[i]);
    if (w[0] == "changed") {
      tables.back().changed = shard;
    } else {
      tables.back().shards.push_back(shard);
    }
  }
  return tables;
}

std::vector<int64_t> SomeIds(const PlainTable& table) {
  std::vector<int64_t> ids = {-1, 0, 1, INT64_MIN, INT64_MAX};
  const auto rows = static_cast<int64_t>(table.num_rows);
  for (int64_t id = rows - 3; id <= rows; ++id) ids.push_back(id);
  for (int64_t id = 0; id < std::min<int64_t>(rows, 200); ++id) {
    ids.push_back(id);
  }
  const auto add = [&ids](const PlainShard& shard) {
    for (uint64_t at = 0; at < shard.num_slots && ids.size() < 2000; ++at) {
      ids.push_back(Load<int64_t>(shard.bytes.data() + kHeader + at * 16));
    }
  };
  for (const PlainShard& shard : table.shards) add(shard);
  if (table.changed) add(*table.changed);
  return ids;
}

bool SameValue(float one, float two) {
  return one == two || (std::isnan(one) && std::isnan(two));
}

void CheckTable(const PlainTable& plain, const EmbeddingTable& table) {
  const std::vector<int64_t> ids = SomeIds(plain);
  const std::vector<float> absent(plain.dim, -123.5f);
  std::vector<float> out(ids.size() * plain.dim);
  EXPECT(table.Gather(ids.data(), ids.size(), absent.data(), out.data()) ==
             ids.size(),
         plain.name);
  for (size_t i = 0; i < ids.size(); ++i) {
    const char* const row = plain.Find(ids[i]);
    for (size_t j = 0; j < plain.dim; ++j) {
      const float expected = row == nullptr ? absent[j] : plain.Value(row, j);
      EXPECT(SameValue(out[i * plain.dim + j], expected),
             plain.name + ", id " + std::to_string(ids[i]));
    }
  }
  // A pool of one id a row is that id's vector, or nothing at length 0.
  std::vector<int64_t> lengths(ids.size());
  for (size_t i = 0; i < ids.size(); ++i) lengths[i] = i % 3 == 0 ? 0 : ids[i];
  std::vector<float> pooled(out.size());
  table.Pool(ids.data(), lengths.data(), nullptr, ids.size(), 1, Pooling::kMax,
             absent.data(), pooled.data());
  for (size_t at = 0; at < out.size(); ++at) {
    const bool none = lengths[at / plain.dim] <= 0;
    EXPECT(SameValue(pooled[at], none ? 0 : out[at]), plain.name);
  }
}

}  // namespace
}  // namespace qianmo::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace qianmo::fuzz;
  const Files files =
      Unpack(std::string(reinterpret_cast<const char*>(data), size));
  const std::string folder = EmptyFolder();
  for (const auto& [name, bytes] : files) {
    WriteFile(folder + "/" + name, bytes);
  }
  std::string error;
  const auto version = qianmo::MappedVersion::Open(folder, &error);
  if (version == nullptr) {
    EXPECT(error.rfind(folder, 0) == 0, "the error names no file: " + error);
    EXPECT(error.find('\n') == std::string::npos, error);
    return 0;
  }
  bool is_whole = true;
  for (const PlainTable& plain : PlainRead(files)) {
    const qianmo::EmbeddingTable* const table = version->table(plain.name);
    EXPECT(table != nullptr, plain.name);
    CheckTable(plain, *table);
    std::vector<PlainShard> shards = plain.shards;
    if (plain.changed) shards.push_back(*plain.changed);
    for (const PlainShard& shard : shards) {
      is_whole &= shard.crc == PlainCrc(shard.bytes.data() + kHeader,
                                        shard.bytes.size() - kHeader);
    }
  }
  EXPECT(version->Verify(&error) == is_whole, error);
  EXPECT(is_whole || error.rfind(folder, 0) == 0, error);
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size,
                                          size_t max_size, unsigned int seed) {
  using namespace qianmo::fuzz;
  std::mt19937 random(seed);
  Files files = Unpack(std::string(reinterpret_cast<char*>(data), size));
  if (files.empty() || random() % 50 == 0) {
    return LLVMFuzzerMutate(data, size, max_size);
  }
  const auto file = std::next(files.begin(), random() % files.size());
  std::string& bytes = file->second;
  const uint32_t what = random() % 8;
  if (bytes.size() < kHeader || what == 0) {
    Mutate(&bytes, bytes.size() + 64);
  } else if (what == 1) {
    bytes.resize(random() % 2 == 0 ? random() % (bytes.size() + 1)
                                   : bytes.size() + random() % 5000);
  } else {
    // A few bytes of the header's numbers, or of slots and rows.
    const size_t first = what < 5 ? 0 : kHeader;
    const size_t end = what < 5 ? 144 : bytes.size();
    if (first < end) {
      const size_t at = first + random() % (end - first) / 8 * 8;
      std::string part = bytes.substr(at, 8);
      const size_t width = part.size();
      Mutate(&part, width);
      part.resize(width);
      bytes.replace(at, width, part);
    }
  }
  if (random() % 16 != 0) Seal(&files, random() % 4 != 0);
  return Give(Pack(files), data, size, max_size);
}
