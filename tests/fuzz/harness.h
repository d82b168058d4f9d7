// What the fuzzing harnesses of the C++ cores share.

#ifndef QIANMO_TESTS_FUZZ_HARNESS_H_
#define QIANMO_TESTS_FUZZ_HARNESS_H_

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

// libFuzzer's; replay.cc has a plain one for the ordinary test suite.
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

// Stops the run at a difference. libFuzzer writes down the input that led here.
#define EXPECT(condition, what)                                               \
  do {                                                                        \
    if (!(condition)) {                                                       \
      std::fprintf(stderr, "%s:%d: %s\n%s\n", __FILE__, __LINE__, #condition, \
                   std::string(what).c_str());                                \
      std::abort();                                                           \
    }                                                                         \
  } while (false)

namespace qianmo::fuzz {

template <typename T>
T Load(const char* from) {
  T value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <typename T>
void Store(T value, char* to) {
  std::memcpy(to, &value, sizeof(value));
}

// A folder of this process in memory, which is empty whenever it is asked for.
inline const std::string& EmptyFolder() {
  static const std::string* const folder = [] {
    char made[] = "/dev/shm/qianmo_fuzz_XXXXXX";
    EXPECT(mkdtemp(made) != nullptr, made);
    std::atexit([] { std::filesystem::remove_all(EmptyFolder()); });
    return new std::string(made);
  }();
  for (const auto& entry : std::filesystem::directory_iterator(*folder)) {
    std::filesystem::remove_all(entry.path());
  }
  return *folder;
}

inline void WriteFile(const std::string& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  EXPECT(file.flush(), path);
}

// Mutates one part of an input in place or grows it.
inline void Mutate(std::string* bytes, size_t max_size) {
  std::string room = *bytes;
  room.resize(std::max(max_size, room.size()));
  const size_t size = LLVMFuzzerMutate(reinterpret_cast<uint8_t*>(room.data()),
                                       bytes->size(), room.size());
  bytes->assign(room, 0, size);
}

// Copies a mutated input to where libFuzzer wants it, if there is room.
inline size_t Give(const std::string& bytes, uint8_t* data, size_t size,
                   size_t max_size) {
  if (bytes.size() > max_size) return size;
  std::memcpy(data, bytes.data(), bytes.size());
  return bytes.size();
}

}  // namespace qianmo::fuzz

#endif  // QIANMO_TESTS_FUZZ_HARNESS_H_
