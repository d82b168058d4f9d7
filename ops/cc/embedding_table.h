// What a lookup reads, wherever the rows lie: tables of vectors and the
// versions that hold them. Without TensorFlow's types.

#ifndef QIANMO_OPS_CC_EMBEDDING_TABLE_H_
#define QIANMO_OPS_CC_EMBEDDING_TABLE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace qianmo {

enum class RowType : uint32_t { kFloat32, kFloat16, kBfloat16, kInt8 };
// sum of w v over: sum of w; 1; the root of the sum of w^2. Or the largest v.
enum class Pooling { kMean, kSum, kSqrtn, kMax };

// CRC-32 as in zlib; `crc` is that of the bytes before.
uint32_t Crc32(const void* data, size_t size, uint32_t crc = 0);

// Spreads ids over slots: the finaliser of MurmurHash3.
uint64_t HashId(int64_t id);

constexpr uint64_t kMaxRows = uint64_t{1} << 40;

// Words of manifests.
bool ParseNumber(const std::string& word, uint64_t most, uint64_t* number);
bool ParseCrc(const std::string& word, uint32_t* crc);
// Letters, digits, `_`, and in files' names `.` and `-`: never a path.
bool IsName(const std::string& word, const char* also);

// The lines of a manifest as words, without the last line, which is their
// checksum. Returns false and what is wrong.
bool ParseManifest(const std::string& manifest,
                   std::vector<std::vector<std::string>>* lines,
                   int64_t* version, int64_t* space, std::string* error);

// What a manifest's line says of a table.
struct TableLayout {
  std::string name;
  RowType type = RowType::kFloat32;
  bool hashed = false;  // any ids; otherwise 0 to num_rows - 1
  uint32_t dim = 0;
  uint64_t row_bytes = 0;
  uint64_t num_rows = 0;
  int64_t default_id = 0;
  uint64_t shard_rows = 0;

  // Returns false when the line does not describe a table.
  bool Parse(const std::vector<std::string>& line);
};

// One table of an embedding version. Threads may share it.
class EmbeddingTable {
 public:
  virtual ~EmbeddingTable() = default;

  const TableLayout& layout() const { return layout_; }
  const std::string& name() const { return layout_.name; }
  uint32_t dim() const { return layout_.dim; }
  uint64_t num_rows() const { return layout_.num_rows; }
  // The vector of the table's default id, for ids that have no row.
  const std::vector<float>& default_vector() const { return default_vector_; }

  // Writes the vectors of ids[0] ... ids[n - 1] to out, [n, dim]. An id without
  // a row gets `absent`, or ends the work where that is null. Returns the place
  // of the id that ended it, or n.
  size_t Gather(const int64_t* ids, size_t n, const float* absent,
                float* out) const;

  // Writes one vector for each row of ids [n, width] to out, [n, dim], from the
  // first lengths[i] ids of row i; a length is clipped to [0, width], and a row
  // of length 0, or whose weights cancel out, gets zeros. `weights` [n, width]
  // or null is not for kMax. Otherwise as Gather; the place is in [0, n].
  size_t Pool(const int64_t* ids, const int64_t* lengths, const float* weights,
              size_t n, size_t width, Pooling how, const float* absent,
              float* out) const;

 protected:
  static constexpr size_t kBlock = 64;  // ids whose rows are found together

  explicit EmbeddingTable(TableLayout layout) : layout_(std::move(layout)) {}
  EmbeddingTable(const EmbeddingTable&) = default;
  EmbeddingTable(EmbeddingTable&&) = default;

  // Addresses of the rows of up to kBlock ids, null for ids without one. Memory
  // is asked for them, so that they are near when they are read.
  virtual void Find(const int64_t* ids, size_t n, const char** rows) const = 0;

  // Reads the default vector, once rows can be found. False if it has none.
  bool ReadDefault();

 private:
  // Calls consume(i, address or null) for each id until it returns false.
  template <typename Consume>
  size_t ForEachRow(const int64_t* ids, size_t n, Consume consume) const;
  template <RowType kType>
  size_t GatherAs(const int64_t* ids, size_t n, const float* absent,
                  float* out) const;
  template <RowType kType>
  size_t PoolAs(const int64_t* ids, const int64_t* lengths,
                const float* weights, size_t n, size_t width, Pooling how,
                const float* absent, float* out) const;

  TableLayout layout_;
  std::vector<float> default_vector_;
};

// Ids [rows, width] that a lookup reads of a table; of each row the first
// lengths[i], or all where that is null.
struct WantedIds {
  const EmbeddingTable* table;
  const int64_t* ids;
  const int64_t* lengths;
  size_t rows, width;
};

// One opened embedding version; it never changes.
class EmbeddingVersion {
 public:
  virtual ~EmbeddingVersion() = default;

  int64_t version() const { return version_; }
  int64_t space() const { return space_; }
  // A folder, or an address.
  const std::string& where() const { return where_; }
  // Null when there is none of that name.
  virtual const EmbeddingTable* table(const std::string& name) const = 0;

  // Whether rows must be fetched before the tables have them.
  virtual bool is_remote() const { return false; }
  // Brings rows here: returns the version with tables that hold these rows
  // alone. Blocks. Returns null and an error when they cannot be had.
  virtual std::shared_ptr<const EmbeddingVersion> Fetch(
      const std::vector<WantedIds>& wanted, std::string* error) const;

  // Takes note of a reading, and whether it waited for a disk.
  void NoteReading(bool waited) const;
  // Whether rows have been in memory for a while: no reading has waited lately.
  bool IsInMemory() const;

 protected:
  int64_t version_ = 0;
  int64_t space_ = 0;
  std::string where_;

 private:
  mutable std::atomic<int64_t> readings_in_memory_{0};  // since one waited
};

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_EMBEDDING_TABLE_H_
