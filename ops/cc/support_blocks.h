// Blocks of one size without gaps between them.

#ifndef QIANMO_OPS_CC_SUPPORT_BLOCKS_H_
#define QIANMO_OPS_CC_SUPPORT_BLOCKS_H_

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace qianmo {

// Blocks 0 ... size() - 1 fill pages that come from the system one by one. When
// a block is removed the last one moves to its place, so a page that is no
// longer needed is always the last, and goes back to the system at once.
class BlockPool {
 public:
  struct Unmap {
    size_t bytes = 0;
    void operator()(char* page) const { munmap(page, bytes); }
  };
  using Page = std::unique_ptr<char, Unmap>;

  explicit BlockPool(size_t block_bytes)
      : block_bytes_(block_bytes),
        per_page_(block_bytes < kPageBytes ? kPageBytes / block_bytes : 1) {}

  uint32_t size() const { return size_; }
  size_t block_bytes() const { return block_bytes_; }

  char* At(uint32_t block) const {
    return pages_[block / per_page_].get() + block % per_page_ * block_bytes_;
  }

  // Adds a block at the end; returns false when there is no memory for it.
  bool Add() {
    if (size_ == pages_.size() * per_page_) {
      const size_t bytes = per_page_ == 1 ? block_bytes_ : kPageBytes;
      void* const page = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (page == MAP_FAILED) return false;
      pages_.emplace_back(static_cast<char*>(page), Unmap{bytes});
    }
    ++size_;
    return true;
  }

  // Removes the last block. Returns the page that it leaves empty, if it does,
  // so that the caller can give it back when it holds no lock.
  Page RemoveLast() {
    --size_;
    Page page;
    if (size_ % per_page_ == 0) {
      page = std::move(pages_.back());
      pages_.pop_back();
    }
    return page;
  }

 private:
  static constexpr size_t kPageBytes = size_t{512} << 10;

  const size_t block_bytes_;
  const size_t per_page_;
  uint32_t size_ = 0;
  std::vector<Page> pages_;
};

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_SUPPORT_BLOCKS_H_
