#include "ops/cc/support_log.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>

namespace qianmo {
namespace {

constexpr size_t kWord = 8;
constexpr char kHeader[] = "QIANMOS2", kPut[] = "QSPUTROW",
               kDrop[] = "QSDROPTK";
constexpr char kOlderHeader[] = "QIANMOS1";  // of rows without event ids
constexpr size_t kHeaderBytes = 3 * kWord, kDropBytes = 3 * kWord;

template <typename T>
T Load(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <typename T>
void AppendValue(T value, std::vector<char>* out) {
  const char* const bytes = reinterpret_cast<const char*>(&value);
  out->insert(out->end(), bytes, bytes + sizeof(value));
}

// Ends the record that began at `begin`.
void AppendChecksum(size_t begin, std::vector<char>* out) {
  AppendValue(Checksum(out->data() + begin, out->size() - begin), out);
}

// Whether the bytes at `at` are a whole record of that kind and size.
bool IsRecord(const char* at, const char* end, const char* kind, size_t size) {
  return static_cast<size_t>(end - at) >= size &&
         std::memcmp(at, kind, kWord) == 0 &&
         Checksum(at, size - kWord) == Load<uint64_t>(at + size - kWord);
}

std::vector<char> Header(const SupportShape& shape) {
  std::vector<char> header(kHeader, kHeader + kWord);
  AppendValue(static_cast<uint32_t>(shape.dim), &header);
  AppendValue(static_cast<uint32_t>(shape.num_labels), &header);
  AppendChecksum(0, &header);
  return header;
}

}  // namespace

uint64_t Checksum(const char* data, size_t size) {
  // Each step is one-to-one in the word and in the sum, so that a change of one
  // word always shows.
  uint64_t sum = size;
  for (size_t i = 0; i < size; i += kWord) {
    sum = (sum ^ Load<uint64_t>(data + i)) * 0x9E3779B97F4A7C15u;
    sum ^= sum >> 32;
  }
  return sum;
}

void AppendPut(int64_t task, const char* row, size_t row_bytes,
               std::vector<char>* out) {
  const size_t begin = out->size();
  out->insert(out->end(), kPut, kPut + kWord);
  AppendValue(task, out);
  out->insert(out->end(), row, row + row_bytes);
  AppendChecksum(begin, out);
}

void AppendDrop(int64_t task, std::vector<char>* out) {
  const size_t begin = out->size();
  out->insert(out->end(), kDrop, kDrop + kWord);
  AppendValue(task, out);
  AppendChecksum(begin, out);
}

std::string FileError(const std::string& what, const std::string& path) {
  return what + " `" + path + "`: " + std::strerror(errno);
}

bool ReadLog(const std::string& path, const SupportShape& shape,
             const std::function<void(int64_t, const char*)>& put,
             const std::function<void(int64_t)>& drop, LogContent* content,
             std::string* error) {
  *content = LogContent();
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat found;
  if (fd < 0 || fstat(fd, &found) != 0) {
    *error = FileError("Cannot read", path);
    if (fd >= 0) close(fd);
    return false;
  }
  const size_t size = found.st_size;
  if (size < kHeaderBytes) {
    close(fd);
    content->damaged = size;
    return true;
  }
  void* const mapped = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
  close(fd);
  if (mapped == MAP_FAILED) {
    *error = FileError("Cannot map", path);
    return false;
  }
  madvise(mapped, size, MADV_SEQUENTIAL);

  const char* const begin = static_cast<const char*>(mapped);
  const char* const end = begin + size;
  const size_t put_bytes = 2 * kWord + shape.row_bytes() + kWord;
  content->header_ok = IsRecord(begin, end, kHeader, kHeaderBytes);
  bool fits = !IsRecord(begin, end, kOlderHeader, kHeaderBytes);
  if (!fits) {
    *error = "`" + path +
             "` holds rows of format 1, which have no event ids, and format 2 "
             "is read. Give another folder, or delete this one";
  }
  if (content->header_ok) {
    const auto dim = Load<uint32_t>(begin + kWord);
    const auto num_labels = Load<uint32_t>(begin + kWord + sizeof(uint32_t));
    fits = dim == static_cast<uint32_t>(shape.dim) &&
           num_labels == static_cast<uint32_t>(shape.num_labels);
    if (!fits) {
      *error = "`" + path + "` holds rows of dim " + std::to_string(dim) +
               " with " + std::to_string(num_labels) +
               " labels. Asked for: " + std::to_string(shape.dim) + " with " +
               std::to_string(shape.num_labels);
    }
  }
  const char* at = begin + kHeaderBytes;
  uint64_t read = content->header_ok ? kHeaderBytes : 0;
  content->end = kHeaderBytes;
  while (fits && at < end) {
    if (IsRecord(at, end, kPut, put_bytes)) {
      put(Load<int64_t>(at + kWord), at + 2 * kWord);
      at += put_bytes;
      read += put_bytes;
    } else if (IsRecord(at, end, kDrop, kDropBytes)) {
      drop(Load<int64_t>(at + kWord));
      at += kDropBytes;
      read += kDropBytes;
    } else {
      ++at;  // until the next record
      continue;
    }
    content->end = at - begin;
  }
  content->damaged = size - read;
  munmap(mapped, size);
  return fits;
}

bool LogContent::IsWhole(const std::string& path, std::string* error) const {
  if (damaged == 0 && header_ok) return true;
  *error = "`" + path + "` should be an exported support store, and " +
           std::to_string(damaged) +
           " bytes of it are not; the rows in the others were added";
  return false;
}

std::unique_ptr<LogFile> LogFile::Open(const std::string& path,
                                       const SupportShape& shape, uint64_t keep,
                                       std::string* error) {
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (fd >= 0) {
    std::unique_ptr<LogFile> file(new LogFile(fd, keep));
    if (ftruncate(fd, keep) == 0 && (keep > 0 || file->Append(Header(shape)))) {
      return file;
    }
  }
  *error = FileError("Cannot write", path);
  return nullptr;
}

LogFile::~LogFile() { close(fd_); }

bool LogFile::Append(const std::vector<char>& data) {
  size_t done = 0;
  while (done < data.size()) {
    const ssize_t n = pwrite(fd_, data.data() + done, data.size() - done,
                             static_cast<off_t>(bytes_ + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) {
      const int reason = errno;
      // Should this fail too, a torn record stays behind, which readers skip.
      (void)!ftruncate(fd_, static_cast<off_t>(bytes_));
      errno = reason;
      return false;
    }
    done += n;
  }
  bytes_ += done;
  return true;
}

bool LogFile::Sync() { return fdatasync(fd_) == 0; }

bool SyncFolder(const std::string& path, std::string* error) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const bool synced = fd >= 0 && fsync(fd) == 0;
  if (!synced) *error = FileError("Cannot sync", path);
  if (fd >= 0) close(fd);
  return synced;
}

bool WriteWhole(const std::string& path, const SupportShape& shape,
                const std::function<bool(LogFile*, std::string*)>& fill,
                uint64_t* bytes, std::string* error) {
  const std::string writing = path + ".writing";
  const auto file = LogFile::Open(writing, shape, 0, error);
  if (!file) return false;
  error->clear();
  const std::string folder = std::filesystem::path(path).parent_path();
  if (fill(file.get(), error) && file->Sync() &&
      rename(writing.c_str(), path.c_str()) == 0 &&
      SyncFolder(folder.empty() ? "." : folder, error)) {
    *bytes = file->bytes();
    return true;
  }
  if (error->empty()) *error = FileError("Cannot write", path);
  unlink(writing.c_str());
  return false;
}

}  // namespace qianmo
