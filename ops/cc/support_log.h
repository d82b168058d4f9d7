// The files that hold rows of the support store.
//
// A file is a header and records; logs, snapshots and exports are alike:
//
//   header   "QIANMOS2", uint32 dim, uint32 num_labels, uint64 sum
//   put      "QSPUTROW", int64 task, row, uint64 sum
//   drop     "QSDROPTK", int64 task, uint64 sum
//
// Rows are those of support_row.h. A sum is that of the bytes before it in its
// record. Numbers are little-endian. Records stand in the order in which they
// were applied to their task.

#ifndef QIANMO_OPS_CC_SUPPORT_LOG_H_
#define QIANMO_OPS_CC_SUPPORT_LOG_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "ops/cc/support_row.h"

namespace qianmo {

// Changes when any one of the words changes; `size` is a multiple of 8.
uint64_t Checksum(const char* data, size_t size);

void AppendPut(int64_t task, const char* row, size_t row_bytes,
               std::vector<char>* out);
void AppendDrop(int64_t task, std::vector<char>* out);

struct LogContent {
  bool header_ok = false;
  uint64_t end = 0;      // of the last record that could be read
  uint64_t damaged = 0;  // bytes that are no part of a record, a torn tail too

  // Whether nothing of an exported file was damaged; if not, with an error.
  bool IsWhole(const std::string& path, std::string* error) const;
};

// Calls put(task, row) and drop(task) for the records of a file, in order. A
// record whose sum is wrong is skipped. Returns false and an error when the
// file cannot be read, or holds rows of another shape or an older format.
bool ReadLog(const std::string& path, const SupportShape& shape,
             const std::function<void(int64_t, const char*)>& put,
             const std::function<void(int64_t)>& drop, LogContent* content,
             std::string* error);

// A file that grows at its end.
class LogFile {
 public:
  // Keeps the first `keep` bytes of the file; with none, starts it with a
  // header. Returns null and an error when that fails.
  static std::unique_ptr<LogFile> Open(const std::string& path,
                                       const SupportShape& shape, uint64_t keep,
                                       std::string* error);
  LogFile(const LogFile&) = delete;
  LogFile& operator=(const LogFile&) = delete;
  ~LogFile();

  // Appends all of `data` or, when it returns false, nothing.
  bool Append(const std::vector<char>& data);
  // Waits until what was appended would outlast a power failure.
  bool Sync();
  uint64_t bytes() const { return bytes_; }

 private:
  LogFile(int fd, uint64_t bytes) : fd_(fd), bytes_(bytes) {}
  const int fd_;
  std::atomic<uint64_t> bytes_;
};

// Writes a file, which has its name when it is complete: `fill` appends to it,
// and returns false to give up, with an error of its own or none for that of
// the file. `bytes` is its size.
bool WriteWhole(const std::string& path, const SupportShape& shape,
                const std::function<bool(LogFile*, std::string*)>& fill,
                uint64_t* bytes, std::string* error);

// Waits until the names in a folder would outlast a power failure. Returns
// false and an error when that fails.
bool SyncFolder(const std::string& path, std::string* error);

// "what `path`: reason", from errno.
std::string FileError(const std::string& what, const std::string& path);

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_SUPPORT_LOG_H_
