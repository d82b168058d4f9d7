// Runs a harness without libFuzzer, for compilers that lack it: each seed as it
// is, then seeded mutations of the seeds.
//
//   harness RUNS SEED...

#include <cstdio>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "tests/fuzz/harness.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size,
                                          size_t max_size, unsigned int seed);

namespace {

constexpr size_t kMaxSize = 1 << 17;

std::mt19937& Random() {
  static std::mt19937 random(1);
  return random;
}

}  // namespace

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size,
                                   size_t max_size) {
  auto& random = Random();
  if (size == 0 || random() % 8 == 0) {
    if (size < max_size) data[size++] = static_cast<uint8_t>(random());
    return size;
  }
  uint8_t* const at = data + random() % size;
  switch (random() % 4) {
    case 0:
      *at = static_cast<uint8_t>(random());
      break;
    case 1:
      *at ^= static_cast<uint8_t>(1u << random() % 8);
      break;
    case 2:
      *at = static_cast<uint8_t>(*at + (random() % 2 == 0 ? 1 : -1));
      break;
    default:
      size -= random() % (data + size - at) + 1;
  }
  return size;
}

int main(int argc, char** argv) {
  const int runs = std::atoi(argv[1]);
  std::vector<std::string> seeds;
  for (int i = 2; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    seeds.emplace_back(std::istreambuf_iterator<char>(file),
                       std::istreambuf_iterator<char>());
  }
  EXPECT(!seeds.empty(), "no seeds");
  const auto run = [](const std::string& bytes) {
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()),
                           bytes.size());
  };
  for (const std::string& seed : seeds) run(seed);
  for (int i = 0; i < runs; ++i) {
    std::string bytes = seeds[Random()() % seeds.size()];
    for (uint32_t edits = Random()() % 3 + 1; edits > 0; --edits) {
      size_t size = bytes.size();
      bytes.resize(kMaxSize);
      size = LLVMFuzzerCustomMutator(reinterpret_cast<uint8_t*>(bytes.data()),
                                     size, kMaxSize, Random()());
      bytes.resize(size);
    }
    run(bytes);
  }
  std::printf("%d mutations of %zu seeds\n", runs, seeds.size());
  return 0;
}
