// Embedding tables in memory-mapped files, without TensorFlow's types.
//
// A store is a folder: one folder for each embedding version, named by its
// number, and the file CURRENT, which holds the number of the version to read.
//
//   CURRENT              "7\n"; replaced by a rename
//   7/MANIFEST           text, see below; its last line is its own checksum
//   7/item-00000-of-00002.rows  one shard: header, index of a hash table, rows
//
// MANIFEST, words separated by one space:
//
//   qianmo embeddings 1
//   version 7 space 5
//   table item dense float32 dim 16 rows 1500000 default 0 shard_rows 1048576
//   shard item-00000-of-00002.rows rows 1048576 bytes 67112960 crc 0123abcd
//   shard item-00001-of-00002.rows rows 451424 bytes 28895232 crc 4567cdef
//   crc 89ab0123
//
// Versions of one space hold vectors that fit the same graphs; the space has
// the number of the version that began it. A table's shards follow it. Row `id`
// of a dense table is row id mod shard_rows of shard id / shard_rows. A hash
// table (`hash`; shard_rows 0) has 2^s shards; HashId(id) names the shard by
// its top s bits and the home slot by its lowest ones, and the row stands in
// the home slot or in one of the few after it. A table's last line may be
//
//   changed item-changed-7.rows rows 40 bytes 11264 crc 2345bcde
//
// a shard of a hash table, whose rows stand in place of those of the same ids,
// or are added. Vectors are float32, float16,
// bfloat16, or int8 after a float scale.
//
// Opening maps the files and reads manifest and headers alone, which must agree
// with each other and with the files' sizes; Verify() reads every byte. Nothing
// that a file holds can make a reader look past its end.

#ifndef QIANMO_OPS_CC_EMBEDDING_VERSION_H_
#define QIANMO_OPS_CC_EMBEDDING_VERSION_H_

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ops/cc/embedding_table.h"

namespace qianmo {

// A file mapped for reading.
class MappedFile {
 public:
  // Returns null and an error when there is no such file, or it is empty.
  static std::unique_ptr<MappedFile> Open(const std::string& path,
                                          std::string* error);
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  const char* data() const { return data_; }
  uint64_t size() const { return size_; }

 private:
  MappedFile(const char* data, uint64_t size) : data_(data), size_(size) {}
  const char* data_;
  uint64_t size_;
};

// One slot of a hash table's index; `row` is kNoRow in an empty one.
struct Slot {
  static constexpr uint64_t kNoRow = ~uint64_t{0};
  int64_t id;
  uint64_t row;
};

// Rows of one table in one file.
struct Shard {
  std::string path;
  uint64_t bytes = 0;
  uint32_t crc = 0;  // of all bytes after the header
  uint64_t num_rows = 0;
  const char* rows = nullptr;
  const Slot* slots = nullptr;  // null in a dense table
  uint64_t home_mask = 0;       // of the home slot
  uint64_t tail = 0;            // slots to look at after the home slot
  std::unique_ptr<MappedFile> file;
};

// A table whose rows lie in mapped files.
class MappedTable : public EmbeddingTable {
 private:
  friend class MappedVersion;
  using EmbeddingTable::EmbeddingTable;

  void Find(const int64_t* ids, size_t n, const char** rows) const override;
  void FindDense(const int64_t* ids, size_t n, const char** rows) const;
  void FindHashed(const Shard* shards, int shift, const int64_t* ids, size_t n,
                  const char** rows) const;
  void Prefetch(const char* row) const;

  int shift_ = 0;  // dense: id >> shift_ is the shard; hashed: HashId(id) >> it
  std::vector<Shard> shards_;
  Shard changed_;  // without slots when no row changed
};

// An embedding version in a folder.
class MappedVersion : public EmbeddingVersion {
 public:
  // Maps the version in `folder`. Returns null and an error that names the file
  // and what is wrong with it.
  static std::shared_ptr<const MappedVersion> Open(const std::string& folder,
                                                   std::string* error);

  const MappedTable* table(const std::string& name) const override;

  // Reads every byte and compares the checksums. Returns false and an error
  // that names the file that differs.
  bool Verify(std::string* error) const;

 private:
  bool Parse(const std::string& manifest, std::string* error);
  bool OpenShard(const MappedTable& table, uint64_t number, bool hashed,
                 Shard* shard, std::string* error);

  std::map<std::string, MappedTable> tables_;
};

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_EMBEDDING_VERSION_H_
