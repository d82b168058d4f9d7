// Work that a thread of its own does again and again.

#ifndef QIANMO_OPS_CC_REPEATED_H_
#define QIANMO_OPS_CC_REPEATED_H_

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>

namespace qianmo {

class Repeated {
 public:
  Repeated(std::chrono::milliseconds pause, std::function<void()> work)
      : thread_([this, pause, work = std::move(work)] {
          std::unique_lock<std::mutex> lock(mutex_);
          while (!stopped_.wait_for(lock, pause, [this] { return stop_; })) {
            lock.unlock();
            work();
            lock.lock();
          }
        }) {}
  Repeated(const Repeated&) = delete;
  Repeated& operator=(const Repeated&) = delete;
  // Waits for the work that is being done.
  ~Repeated() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    stopped_.notify_all();
    thread_.join();
  }

 private:
  std::mutex mutex_;
  std::condition_variable stopped_;
  bool stop_ = false;
  std::thread thread_;  // last, as it uses the others
};

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_REPEATED_H_
