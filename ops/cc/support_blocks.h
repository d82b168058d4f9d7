// Blocks of one size without gaps between them.

#ifndef QIANMO_OPS_CC_SUPPORT_BLOCKS_H_
#define QIANMO_OPS_CC_SUPPORT_BLOCKS_H_

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace qianmo {

// Pages from the system. A few that are given back wait for their next use, as
// tasks that grow take and leave pages all the time. Threads may share it.
class PageStock {
 public:
  static constexpr size_t kPageBytes = size_t{512} << 10;

  struct GiveBack {
    PageStock* stock = nullptr;
    size_t bytes = 0;
    void operator()(char* page) const { stock->Give(page, bytes); }
  };
  using Page = std::unique_ptr<char, GiveBack>;

  PageStock() = default;
  PageStock(const PageStock&) = delete;
  PageStock& operator=(const PageStock&) = delete;
  ~PageStock() {
    for (char* const page : waiting_) munmap(page, kPageBytes);
  }

  // Returns null when there is no memory.
  Page Take(size_t bytes) {
    if (bytes == kPageBytes) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!waiting_.empty()) {
        Page page(waiting_.back(), GiveBack{this, bytes});
        waiting_.pop_back();
        return page;
      }
    }
    void* const page = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) return nullptr;
    return Page(static_cast<char*>(page), GiveBack{this, bytes});
  }

 private:
  static constexpr size_t kMaxWaiting = 16;

  void Give(char* page, size_t bytes) {
    if (bytes == kPageBytes) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (waiting_.size() < kMaxWaiting) {
        waiting_.push_back(page);
        return;
      }
    }
    munmap(page, bytes);
  }

  std::mutex mutex_;
  std::vector<char*> waiting_;
};

// Blocks 0 ... size() - 1 fill pages one after the other. When a block is
// removed the last one moves to its place, so a page that is no longer needed
// is always the last, and goes at once.
class BlockPool {
 public:
  BlockPool(size_t block_bytes, PageStock* stock)
      : block_bytes_(block_bytes),
        per_page_(block_bytes < PageStock::kPageBytes
                      ? PageStock::kPageBytes / block_bytes
                      : 1),
        page_bytes_(per_page_ == 1 ? block_bytes : PageStock::kPageBytes),
        stock_(stock) {}

  uint32_t size() const { return size_; }
  size_t block_bytes() const { return block_bytes_; }

  char* At(uint32_t block) const {
    return pages_[block / per_page_].get() + block % per_page_ * block_bytes_;
  }

  // Adds a block at the end; returns false when there is no memory for it.
  bool Add() {
    if (size_ == pages_.size() * per_page_) {
      PageStock::Page page = stock_->Take(page_bytes_);
      if (!page) return false;
      pages_.push_back(std::move(page));
    }
    ++size_;
    return true;
  }

  // Removes the last block. Returns the page that it leaves empty, if it does,
  // so that the caller can give it back when it holds no lock.
  PageStock::Page RemoveLast() {
    --size_;
    PageStock::Page page;
    if (size_ % per_page_ == 0) {
      page = std::move(pages_.back());
      pages_.pop_back();
    }
    return page;
  }

 private:
  const size_t block_bytes_;
  const size_t per_page_;
  const size_t page_bytes_;
  PageStock* const stock_;
  uint32_t size_ = 0;
  std::vector<PageStock::Page> pages_;
};

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_SUPPORT_BLOCKS_H_
