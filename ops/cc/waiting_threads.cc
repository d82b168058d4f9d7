#include "ops/cc/waiting_threads.h"

#include <algorithm>

#include "tensorflow/core/platform/cpu_info.h"
#include "tensorflow/core/platform/env.h"

namespace qianmo {

tensorflow::thread::ThreadPool* WaitingThreads() {
  static auto* const threads = new tensorflow::thread::ThreadPool(
      tensorflow::Env::Default(), tensorflow::ThreadOptions(), "qianmo_waiting",
      std::max(8, 2 * tensorflow::port::MaxParallelism()),
      /*low_latency_hint=*/false);
  return threads;
}

}  // namespace qianmo
