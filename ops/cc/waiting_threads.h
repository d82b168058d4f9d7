// Threads for ops that may have to wait for a disk or another machine, so that
// none of TensorFlow's does.

#ifndef QIANMO_OPS_CC_WAITING_THREADS_H_
#define QIANMO_OPS_CC_WAITING_THREADS_H_

#include "tensorflow/core/platform/threadpool.h"

namespace qianmo {

// Those of all stores.
tensorflow::thread::ThreadPool* WaitingThreads();

}  // namespace qianmo

#endif  // QIANMO_OPS_CC_WAITING_THREADS_H_
