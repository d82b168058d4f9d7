#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "ops/cc/embedding_lookup.h"
#include "ops/cc/embedding_store.h"
#include "ops/cc/embedding_table.h"
#include "ops/cc/waiting_threads.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_op_kernel.h"

namespace qianmo {
namespace {

using ::tensorflow::AsyncOpKernel;
using ::tensorflow::CancellationManager;
using ::tensorflow::OpInputList;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::OpOutputList;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;
using Clock = std::chrono::steady_clock;

constexpr int64_t kIdsOfAPart = 8192;

// What a handle names: nothing until it is opened.
class StoreResource : public tensorflow::ResourceBase {
 public:
  std::string DebugString() const override { return "an embedding store"; }

  void set_store(std::shared_ptr<EmbeddingStore> store) {
    std::lock_guard<std::mutex> lock(mutex_);
    store_ = std::move(store);
  }

  std::shared_ptr<EmbeddingStore> store() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return store_;
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<EmbeddingStore> store_;
};

class StoreHandleOp : public tensorflow::ResourceOpKernel<StoreResource> {
 public:
  using ResourceOpKernel::ResourceOpKernel;

 private:
  absl::Status CreateResource(StoreResource** resource) override {
    *resource = new StoreResource;
    return absl::OkStatus();
  }
};

class StoreOpenOp : public tensorflow::OpKernel {
 public:
  explicit StoreOpenOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("space", &accepted_.space));
    std::string on_mismatch;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("on_mismatch", &on_mismatch));
    accepted_.fall_back = on_mismatch == "fall_back";
    OP_REQUIRES_OK(ctx, ctx->GetAttr("verify", &verify_));
  }

  void Compute(OpKernelContext* ctx) override {
    tensorflow::core::RefCountPtr<StoreResource> resource;
    OP_REQUIRES_OK(ctx,
                   tensorflow::LookupResource(
                       ctx, tensorflow::HandleFromInput(ctx, 0), &resource));
    const Tensor& path = ctx->input(1);
    OP_REQUIRES(ctx, path.NumElements() == 1,
                absl::InvalidArgumentError(
                    absl::StrCat("`path` should be a scalar. Received: ",
                                 path.shape().DebugString())));
    std::string error;
    auto store = EmbeddingStore::Open(path.flat<tensorflow::tstring>()(0),
                                      accepted_, verify_, &error);
    OP_REQUIRES(ctx, store != nullptr, absl::FailedPreconditionError(error));
    resource->set_store(std::move(store));
  }

 private:
  Accepted accepted_;
  bool verify_;
};

class StoreRowsLostOp : public tensorflow::OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* ctx) override {
    tensorflow::core::RefCountPtr<StoreResource> resource;
    OP_REQUIRES_OK(ctx,
                   tensorflow::LookupResource(
                       ctx, tensorflow::HandleFromInput(ctx, 0), &resource));
    const auto store = resource->store();
    Tensor* out;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, TensorShape(), &out));
    out->scalar<int64_t>()() = store == nullptr ? 0 : store->RowsLost();
  }
};

// How often this thread has waited for a page to come from a disk.
int64_t WaitsForDisk() {
  struct rusage usage;
  getrusage(RUSAGE_THREAD, &usage);
  return usage.ru_majflt;
}

// Calls what is due; one thread for all lookups that have a time limit.
class Alarms {
 public:
  static Alarms* Get() {
    static auto* const alarms = new Alarms;
    return alarms;
  }

  void Add(Clock::time_point when, std::function<void()> call) {
    std::lock_guard<std::mutex> lock(mutex_);
    calls_.emplace(when, std::move(call));
    changed_.notify_one();
  }

 private:
  Alarms() { std::thread(&Alarms::Run, this).detach(); }

  void Run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      if (calls_.empty()) {
        changed_.wait(lock);
      } else if (calls_.begin()->first > Clock::now()) {
        changed_.wait_until(lock, calls_.begin()->first);
      } else {
        const auto call = std::move(calls_.begin()->second);
        calls_.erase(calls_.begin());
        lock.unlock();
        call();
        lock.lock();
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::multimap<Clock::time_point, std::function<void()>> calls_;
};

// What is to be read for one of `ids`.
struct Piece {
  const EmbeddingTable* table;
  Tensor ids;
  Tensor lengths;
  Tensor weights;
  Tensor vectors;
  bool pooled, weighted;
  Pooling how;
  int64_t rows;               // vectors to write
  int64_t width;              // ids of each
  std::vector<float> absent;  // empty: an error
};

// One run of the op. It ends once: with its vectors, an error, a cancellation
// or the end of its time. Threads that are still reading then write into
// tensors that they hold on to and that nobody else reads.
class Lookup : public std::enable_shared_from_this<Lookup> {
 public:
  Lookup(OpKernelContext* ctx, AsyncOpKernel::DoneCallback done,
         std::shared_ptr<const EmbeddingVersion> version,
         std::vector<Piece> pieces)
      : ctx_(ctx),
        done_(std::move(done)),
        version_(std::move(version)),
        pieces_(std::move(pieces)) {
    for (size_t i = 0; i < pieces_.size(); ++i) {
      const Piece& piece = pieces_[i];
      const int64_t step =
          std::max<int64_t>(1, kIdsOfAPart / std::max<int64_t>(1, piece.width));
      for (int64_t begin = 0; begin < piece.rows; begin += step) {
        parts_.push_back({i, begin, std::min(begin + step, piece.rows)});
      }
    }
    const auto* const workers = ctx->device()->tensorflow_cpu_worker_threads();
    threads_ = std::clamp<int64_t>(static_cast<int64_t>(parts_.size()), 1,
                                   workers->num_threads);
    running_ = threads_;
  }

  void Start(int64_t timeout_ms) {
    cancellation_ = ctx_->cancellation_manager();
    if (cancellation_ != nullptr) {
      token_ = cancellation_->get_cancellation_token();
      auto self = shared_from_this();
      if (!cancellation_->RegisterCallback(token_, [self] {
            self->End(absl::CancelledError("The lookup was cancelled."));
          })) {
        return End(absl::CancelledError("The lookup was cancelled."));
      }
    }
    if (timeout_ms > 0) {
      std::weak_ptr<Lookup> weak = shared_from_this();
      Alarms::Get()->Add(
          Clock::now() + std::chrono::milliseconds(timeout_ms),
          [weak, timeout_ms] {
            if (const auto self = weak.lock()) {
              self->Finish(absl::DeadlineExceededError(absl::StrCat(
                  "The lookup took longer than ", timeout_ms, " ms.")));
            }
          });
    }
    // Cancelled or late by now, the context may be gone.
    if (version_->is_remote()) {
      WaitingThreads()->Schedule(
          [self = shared_from_this()] { self->Fetch(); });
    } else {
      Spread(/*stay=*/version_->IsInMemory());
    }
  }

 private:
  struct Part {
    size_t piece;
    int64_t begin, end;
  };

  // Has all threads work, this one among them if it should stay.
  void Spread(bool stay) {
    for (int64_t i = stay ? 1 : 0; i < threads_; ++i) {
      WaitingThreads()->Schedule([self = shared_from_this()] { self->Work(); });
    }
    if (stay) Work();
  }

  void Fetch() {
    std::vector<WantedIds> wanted;
    for (const Piece& piece : pieces_) {
      wanted.push_back(
          {piece.table, piece.ids.flat<int64_t>().data(),
           piece.pooled ? piece.lengths.flat<int64_t>().data() : nullptr,
           static_cast<size_t>(piece.rows), static_cast<size_t>(piece.width)});
    }
    std::string error;
    auto fetched = ended_ ? nullptr : version_->Fetch(wanted, &error);
    // Not UnavailableError, which TensorFlow turns into an InternalError where
    // the op is no communication of its own.
    if (fetched == nullptr) return Finish(absl::AbortedError(error));
    for (Piece& piece : pieces_) {
      piece.table = fetched->table(piece.table->name());
    }
    version_ = std::move(fetched);
    Spread(/*stay=*/true);
  }

  void Work() {
    const int64_t waits = WaitsForDisk();
    for (size_t i; !ended_ && (i = next_++) < parts_.size();) {
      const absl::Status status = Read(parts_[i]);
      if (!status.ok()) Finish(status);
    }
    version_->NoteReading(WaitsForDisk() != waits);
    if (--running_ == 0) Finish(absl::OkStatus());
  }

  absl::Status Read(const Part& part) {
    Piece& piece = pieces_[part.piece];
    const int64_t* const ids =
        piece.ids.flat<int64_t>().data() + part.begin * piece.width;
    float* const out =
        piece.vectors.flat<float>().data() + part.begin * piece.table->dim();
    const float* const absent =
        piece.absent.empty() ? nullptr : piece.absent.data();
    const float* const weights =
        piece.weighted
            ? piece.weights.flat<float>().data() + part.begin * piece.width
            : nullptr;
    const auto n = static_cast<size_t>(part.end - part.begin);
    const size_t done =
        piece.pooled
            ? piece.table->Pool(
                  ids, piece.lengths.flat<int64_t>().data() + part.begin,
                  weights, n, static_cast<size_t>(piece.width), piece.how,
                  absent, out)
            : piece.table->Gather(ids, n, absent, out);
    if (done == n) return absl::OkStatus();
    const int64_t row = part.begin + static_cast<int64_t>(done);
    return absl::NotFoundError(
        absl::StrCat("Table `", piece.table->name(), "` of embedding version ",
                     version_->version(), " has no row of ",
                     piece.pooled ? "an id" : absl::StrCat("id ", ids[done]),
                     " at row ", row, "."));
  }

  // Ends the run from outside of a cancellation.
  void Finish(const absl::Status& status) {
    if (ended_.exchange(true)) return;
    // Waits for a callback that is running, which does nothing any more.
    if (cancellation_ != nullptr) cancellation_->DeregisterCallback(token_);
    Report(status);
  }

  // Ends the run from a cancellation, which forgets its callbacks by itself.
  void End(const absl::Status& status) {
    if (!ended_.exchange(true)) Report(status);
  }

  void Report(const absl::Status& status) {
    if (!status.ok()) ctx_->SetStatus(status);
    // The context is gone after this.
    const auto done = std::move(done_);
    done();
  }

  OpKernelContext* const ctx_;
  AsyncOpKernel::DoneCallback done_;
  std::shared_ptr<const EmbeddingVersion> version_;
  std::vector<Piece> pieces_;
  std::vector<Part> parts_;
  int64_t threads_;
  CancellationManager* cancellation_ = nullptr;
  tensorflow::CancellationToken token_ = CancellationManager::kInvalidToken;
  std::atomic<bool> ended_{false};
  std::atomic<size_t> next_{0};
  std::atomic<int64_t> running_{0};
};

class EmbeddingLookupOp : public AsyncOpKernel {
 public:
  explicit EmbeddingLookupOp(OpKernelConstruction* ctx) : AsyncOpKernel(ctx) {
    int64_t n, m, w;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("N", &n));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("M", &m));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("W", &w));
    OP_REQUIRES_OK(ctx, attrs_.Get(ctx));
    OP_REQUIRES_OK(ctx,
                   attrs_.Check(static_cast<size_t>(n), static_cast<size_t>(m),
                                static_cast<size_t>(w)));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("missing", &missing_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("timeout_ms", &timeout_ms_));
  }

  void ComputeAsync(OpKernelContext* ctx, DoneCallback done) override {
    std::shared_ptr<const EmbeddingVersion> version;
    std::vector<Piece> pieces;
    OP_REQUIRES_OK_ASYNC(ctx, Prepare(ctx, &version, &pieces), done);
    std::make_shared<Lookup>(ctx, std::move(done), std::move(version),
                             std::move(pieces))
        ->Start(timeout_ms_);
  }

 private:
  absl::Status Prepare(OpKernelContext* ctx,
                       std::shared_ptr<const EmbeddingVersion>* version,
                       std::vector<Piece>* pieces) {
    tensorflow::core::RefCountPtr<StoreResource> resource;
    TF_RETURN_IF_ERROR(tensorflow::LookupResource(
        ctx, tensorflow::HandleFromInput(ctx, 0), &resource));
    const auto store = resource->store();
    if (store == nullptr) {
      return absl::FailedPreconditionError("The store was not opened.");
    }
    std::string error;
    *version = store->Snapshot(&error);
    if (*version == nullptr) return absl::FailedPreconditionError(error);

    OpInputList ids, lengths, weights;
    OpOutputList vectors;
    TF_RETURN_IF_ERROR(ctx->input_list("ids", &ids));
    TF_RETURN_IF_ERROR(ctx->input_list("lengths", &lengths));
    TF_RETURN_IF_ERROR(ctx->input_list("weights", &weights));
    TF_RETURN_IF_ERROR(ctx->output_list("vectors", &vectors));
    int length = 0, weight = 0;
    for (int i = 0; i < ids.size(); ++i) {
      Piece piece;
      piece.table = (*version)->table(attrs_.tables[i]);
      if (piece.table == nullptr ||
          piece.table->dim() != static_cast<uint32_t>(attrs_.dims[i])) {
        return absl::FailedPreconditionError(absl::StrCat(
            (*version)->where(), " should have a table `", attrs_.tables[i],
            "` of dim ", attrs_.dims[i], ". It has ",
            piece.table == nullptr
                ? "none of that name"
                : absl::StrCat("one of dim ", piece.table->dim())));
      }
      piece.ids = ids[i];
      piece.pooled = attrs_.pooling[i] != "none";
      piece.weighted = attrs_.weighted[i];
      TensorShape shape = ids[i].shape();
      piece.rows = shape.num_elements();
      piece.width = 1;
      if (piece.pooled) {
        piece.lengths = lengths[length++];
        if (shape.dims() != 2 || piece.lengths.dims() != 1 ||
            piece.lengths.dim_size(0) != shape.dim_size(0)) {
          return absl::InvalidArgumentError(absl::StrCat(
              "`ids` that are pooled should be [B, L], with `lengths` [B]. ",
              "Received: ", shape.DebugString(), " and ",
              piece.lengths.shape().DebugString()));
        }
        if (piece.weighted) {
          piece.weights = weights[weight++];
          if (piece.weights.shape() != shape) {
            return absl::InvalidArgumentError(absl::StrCat(
                "`weights` should have the shape of their `ids`, ",
                shape.DebugString(),
                ". Received: ", piece.weights.shape().DebugString()));
          }
        }
        piece.how = attrs_.pooling[i] == "mean"    ? Pooling::kMean
                    : attrs_.pooling[i] == "sum"   ? Pooling::kSum
                    : attrs_.pooling[i] == "sqrtn" ? Pooling::kSqrtn
                                                   : Pooling::kMax;
        piece.rows = shape.dim_size(0);
        piece.width = shape.dim_size(1);
        shape.RemoveDim(1);
      }
      TF_RETURN_IF_ERROR(shape.AddDimWithStatus(attrs_.dims[i]));
      Tensor* out;
      TF_RETURN_IF_ERROR(vectors.allocate(i, shape, &out));
      piece.vectors = *out;
      if (missing_ == "default") piece.absent = piece.table->default_vector();
      if (missing_ == "zero") piece.absent.assign(piece.table->dim(), 0);
      pieces->push_back(std::move(piece));
    }
    return absl::OkStatus();
  }

  LookupAttrs attrs_;
  std::string missing_;
  int64_t timeout_ms_;
};

REGISTER_KERNEL_BUILDER(
    Name("Qianmo>EmbeddingStoreHandle").Device(tensorflow::DEVICE_CPU),
    StoreHandleOp);
REGISTER_KERNEL_BUILDER(
    Name("Qianmo>EmbeddingStoreOpen").Device(tensorflow::DEVICE_CPU),
    StoreOpenOp);
REGISTER_KERNEL_BUILDER(
    Name("Qianmo>EmbeddingStoreRowsLost").Device(tensorflow::DEVICE_CPU),
    StoreRowsLostOp);
REGISTER_KERNEL_BUILDER(
    Name("Qianmo>EmbeddingLookup").Device(tensorflow::DEVICE_CPU),
    EmbeddingLookupOp);

}  // namespace
}  // namespace qianmo
