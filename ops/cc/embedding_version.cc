#include "ops/cc/embedding_version.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace qianmo {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "the files are little-endian");

constexpr char kMagic[8] = {'Q', 'M', 'R', 'O', 'W', 'S', '1', '\n'};
constexpr uint64_t kHeaderBytes = 4096;
constexpr uint64_t kMaxManifestBytes = 64 << 20;
constexpr uint64_t kMaxTail = 1 << 16;
constexpr uint64_t kChanged = ~uint32_t{0};  // number of that shard
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

uint64_t AlignToPage(uint64_t bytes) {
  return (bytes + kHeaderBytes - 1) / kHeaderBytes * kHeaderBytes;
}

bool IsPowerOfTwo(uint64_t x) { return x != 0 && (x & (x - 1)) == 0; }

bool Fail(std::string* error, const std::string& path,
          const std::string& what) {
  *error = path + ": " + what;
  return false;
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

}  // namespace

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

void MappedTable::Prefetch(const char* row) const {
  for (uint64_t at = 0; at < std::min(layout().row_bytes, 8 * kLine);
       at += kLine) {
    __builtin_prefetch(row + at);
  }
  if (layout().row_bytes % kLine != 0)
    __builtin_prefetch(row + layout().row_bytes - 1);
}

void MappedTable::FindDense(const int64_t* ids, size_t n,
                            const char** rows) const {
  const uint64_t mask = (uint64_t{1} << shift_) - 1;
  for (size_t i = 0; i < n; ++i) {
    const auto id = static_cast<uint64_t>(ids[i]);
    rows[i] = nullptr;
    if (id >= layout().num_rows) continue;
    rows[i] = shards_[id >> shift_].rows + (id & mask) * layout().row_bytes;
    Prefetch(rows[i]);
  }
}

void MappedTable::FindHashed(const Shard* all, int shift, const int64_t* ids,
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
        rows[i] = shard.rows + slot->row * layout().row_bytes;
        Prefetch(rows[i]);
      }
      break;
    }
  }
}

void MappedTable::Find(const int64_t* ids, size_t n, const char** rows) const {
  if (layout().hashed) {
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

std::shared_ptr<const MappedVersion> MappedVersion::Open(
    const std::string& folder, std::string* error) {
  const std::string path = folder + "/MANIFEST";
  const auto file = MappedFile::Open(path, error);
  if (file == nullptr) return nullptr;
  if (file->size() > kMaxManifestBytes) {
    Fail(error, path, "it is too long for a manifest");
    return nullptr;
  }
  auto version = std::make_shared<MappedVersion>();
  version->where_ = folder;
  std::string what;
  if (!version->Parse(std::string(file->data(), file->size()), &what)) {
    // Errors of shards begin with their own path.
    *error = what[0] == '/' || what.rfind(folder, 0) == 0 ? what
                                                          : path + ": " + what;
    return nullptr;
  }
  return version;
}

bool MappedVersion::Parse(const std::string& manifest, std::string* error) {
  const auto refuse = [error](const std::string& what) {
    *error = what;
    return false;
  };
  std::vector<std::vector<std::string>> lines;
  if (!ParseManifest(manifest, &lines, &version_, &space_, error)) return false;
  for (size_t i = 2; i < lines.size();) {
    const std::string where = "line " + std::to_string(i + 1);
    TableLayout layout;
    if (!layout.Parse(lines[i])) {
      return refuse(where + " does not describe a table");
    }
    if (tables_.count(layout.name) != 0) {
      return refuse(where + " describes table `" + layout.name + "` again");
    }
    MappedTable table(layout);
    const uint64_t shard_rows = layout.shard_rows;
    uint64_t rows = 0;
    for (++i; i < lines.size() && lines[i][0] == "shard"; ++i) {
      Shard shard;
      if (!ParseShard(lines[i], where_, &shard)) {
        return refuse("line " + std::to_string(i + 1) +
                      " does not describe a shard");
      }
      const uint64_t left = layout.num_rows - rows;
      if (shard.num_rows > left ||
          (!layout.hashed && shard.num_rows != std::min(shard_rows, left))) {
        return refuse("line " + std::to_string(i + 1) + ": " + lines[i][3] +
                      " rows do not fit its table");
      }
      rows += shard.num_rows;
      table.shards_.push_back(std::move(shard));
    }
    if (rows != layout.num_rows) {
      return refuse("the shards of table `" + layout.name + "` have " +
                    std::to_string(rows) + " of its rows");
    }
    if (layout.hashed ? !IsPowerOfTwo(table.shards_.size()) || shard_rows != 0
                      : !IsPowerOfTwo(shard_rows)) {
      return refuse(where + " has a number of shards, or shard_rows, that " +
                    "does not fit");
    }
    for (uint64_t n = layout.hashed ? table.shards_.size() : shard_rows; n > 1;
         n /= 2) {
      ++table.shift_;
    }
    if (layout.hashed) table.shift_ = 64 - table.shift_;
    for (size_t k = 0; k < table.shards_.size(); ++k) {
      if (!OpenShard(table, k, layout.hashed, &table.shards_[k], error)) {
        return false;
      }
    }
    if (i < lines.size() && lines[i][0] == "changed") {
      if (!ParseShard(lines[i], where_, &table.changed_)) {
        return refuse("line " + std::to_string(i + 1) +
                      " does not describe a shard");
      }
      ++i;
      if (!OpenShard(table, kChanged, true, &table.changed_, error)) {
        return false;
      }
    }
    if (!table.ReadDefault()) {
      *error = "table `" + layout.name + "` has no row of its default id " +
               std::to_string(layout.default_id);
      return false;
    }
    tables_.emplace(layout.name, std::move(table));
  }
  return true;
}

bool MappedVersion::OpenShard(const MappedTable& table, uint64_t number,
                              bool hashed, Shard* opened, std::string* error) {
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
  table.layout().name.copy(name, sizeof(name) - 1);
  if (std::memcmp(h.table, name, sizeof(name)) != 0 || h.shard != number ||
      h.row_type != static_cast<uint32_t>(table.layout().type) ||
      h.hashed != (hashed ? 1 : 0) || h.dim != table.layout().dim ||
      h.num_rows != shard.num_rows || h.data_crc != shard.crc) {
    return Fail(error, shard.path,
                "its header is not of the shard that the manifest describes");
  }
  const bool slots_fit = hashed ? IsPowerOfTwo(h.home_slots) &&
                                      h.home_slots <= kMaxRows &&
                                      h.num_slots >= h.home_slots &&
                                      h.num_slots - h.home_slots <= kMaxTail
                                : h.home_slots == 0 && h.num_slots == 0;
  if (!slots_fit || h.row_bytes != table.layout().row_bytes ||
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

const MappedTable* MappedVersion::table(const std::string& name) const {
  const auto found = tables_.find(name);
  return found == tables_.end() ? nullptr : &found->second;
}

bool MappedVersion::Verify(std::string* error) const {
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
