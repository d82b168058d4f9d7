#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "ops/cc/support_store.h"
#include "ops/cc/waiting_threads.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"

namespace qianmo {
namespace {

using ::tensorflow::AsyncOpKernel;
using ::tensorflow::OpKernel;
using ::tensorflow::OpKernelConstruction;
using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using ::tensorflow::TensorShape;

// A session's hold on a store.
class SupportResource : public tensorflow::ResourceBase {
 public:
  explicit SupportResource(std::shared_ptr<SupportStore> store)
      : store(std::move(store)) {}
  std::string DebugString() const override { return "a support store"; }

  const std::shared_ptr<SupportStore> store;
};

absl::Status StoreOf(OpKernelContext* ctx,
                     std::shared_ptr<SupportStore>* store) {
  tensorflow::core::RefCountPtr<SupportResource> resource;
  TF_RETURN_IF_ERROR(tensorflow::LookupResource(
      ctx, tensorflow::HandleFromInput(ctx, 0), &resource));
  *store = resource->store;
  return absl::OkStatus();
}

absl::Status CheckShape(const OpKernelContext* ctx, int input, const char* name,
                        const TensorShape& shape) {
  const TensorShape& received = ctx->input(input).shape();
  if (received == shape) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "`", name, "` should be of shape ", shape.DebugString(),
      ", as the tasks and the store ask. Received: ", received.DebugString()));
}

class OpenOp : public OpKernel {
 public:
  explicit OpenOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    float ttl_seconds = 0;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("store", &name_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("path", &options_.path));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("dim", &options_.shape.dim));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_labels", &options_.shape.num_labels));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("max_rows", &options_.shape.max_rows));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("ttl_seconds", &ttl_seconds));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("max_tasks", &options_.limits.max_tasks));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("max_bytes", &options_.limits.max_bytes));
    // Beyond a thousand years the number of microseconds would not fit.
    options_.limits.ttl_micros =
        std::llround(1e6 * std::min<double>(ttl_seconds, 3e10));
  }

  void Compute(OpKernelContext* ctx) override {
    std::string error;
    auto store = SupportStore::Shared(name_, options_, &error);
    OP_REQUIRES(ctx, store != nullptr,
                absl::FailedPreconditionError(absl::StrCat(error, ".")));
    tensorflow::core::RefCountPtr<SupportResource> resource;
    OP_REQUIRES_OK(ctx, tensorflow::LookupOrCreateResource<SupportResource>(
                            ctx, tensorflow::HandleFromInput(ctx, 0), &resource,
                            [&](SupportResource** made) {
                              *made = new SupportResource(std::move(store));
                              return absl::OkStatus();
                            }));
  }

 private:
  std::string name_;
  SupportOptions options_;
};

// An op that uses a store, on threads of its own if that may have to wait.
class StoreOp : public AsyncOpKernel {
 public:
  using AsyncOpKernel::AsyncOpKernel;

  void ComputeAsync(OpKernelContext* ctx, DoneCallback done) final {
    std::shared_ptr<SupportStore> store;
    OP_REQUIRES_OK_ASYNC(ctx, StoreOf(ctx, &store), done);
    const bool waits = Waits(*store);
    auto run = [this, ctx, store = std::move(store),
                done = std::move(done)]() mutable {
      const absl::Status status = Run(ctx, store.get());
      if (!status.ok()) ctx->SetStatus(status);
      store.reset();  // who awaits this may open its path anew
      done();
    };
    if (waits) {
      WaitingThreads()->Schedule(std::move(run));
    } else {
      run();
    }
  }

 private:
  virtual bool Waits(const SupportStore& store) const {
    return store.is_remote();
  }
  virtual absl::Status Run(OpKernelContext* ctx, SupportStore* store) = 0;
};

class PutOp : public StoreOp {
 public:
  using StoreOp::StoreOp;

 private:
  absl::Status Run(OpKernelContext* ctx, SupportStore* store) override {
    const int64_t n = ctx->input(1).NumElements();
    const int64_t dim = store->shape().dim;
    const int64_t num_labels = store->shape().num_labels;
    TF_RETURN_IF_ERROR(CheckShape(ctx, 1, "task_id", {n}));
    TF_RETURN_IF_ERROR(CheckShape(ctx, 2, "h", {n, dim}));
    TF_RETURN_IF_ERROR(CheckShape(ctx, 3, "labels", {n, num_labels}));
    TF_RETURN_IF_ERROR(CheckShape(ctx, 4, "weights", {n, num_labels}));
    TF_RETURN_IF_ERROR(CheckShape(ctx, 5, "time", {n}));
    TF_RETURN_IF_ERROR(CheckShape(ctx, 6, "event_id", {n}));
    TF_RETURN_IF_ERROR(CheckShape(ctx, 7, "version", {n}));
    Tensor* status = nullptr;
    TF_RETURN_IF_ERROR(ctx->allocate_output(0, {n}, &status));
    store->Put(
        {static_cast<size_t>(n), ctx->input(1).flat<int64_t>().data(),
         ctx->input(2).flat<float>().data(), ctx->input(3).flat<float>().data(),
         ctx->input(4).flat<float>().data(),
         ctx->input(5).flat<int64_t>().data(),
         ctx->input(6).flat<int64_t>().data(),
         ctx->input(7).flat<int64_t>().data()},
        status->flat<int32_t>().data());
    return absl::OkStatus();
  }
};

class GetOp : public StoreOp {
 public:
  explicit GetOp(OpKernelConstruction* ctx) : StoreOp(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("dim", &dim_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_labels", &num_labels_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("max_rows", &max_rows_));
    OP_REQUIRES(ctx, 1 <= max_rows_ && max_rows_ <= kMaxTaskRows,
                absl::InvalidArgumentError(
                    absl::StrCat("`max_rows` should be in [1, ", kMaxTaskRows,
                                 "]. Received: ", max_rows_)));
  }

 private:
  absl::Status Run(OpKernelContext* ctx, SupportStore* store) override {
    if (store->shape().dim != dim_ ||
        store->shape().num_labels != num_labels_) {
      return absl::InvalidArgumentError(
          absl::StrCat("`dim` and `num_labels` should be the store's, ",
                       store->shape().dim, " and ", store->shape().num_labels,
                       ". Received: ", dim_, " and ", num_labels_));
    }
    const int64_t u = ctx->input(1).NumElements();
    TF_RETURN_IF_ERROR(CheckShape(ctx, 1, "task_id", {u}));
    TF_RETURN_IF_ERROR(CheckShape(ctx, 2, "version", {}));
    Tensor *h = nullptr, *labels = nullptr, *weights = nullptr, *time = nullptr,
           *event = nullptr, *count = nullptr;
    const TensorShape label_shape({u, max_rows_, num_labels_});
    TF_RETURN_IF_ERROR(ctx->allocate_output(0, {u, max_rows_, dim_}, &h));
    TF_RETURN_IF_ERROR(ctx->allocate_output(1, label_shape, &labels));
    TF_RETURN_IF_ERROR(ctx->allocate_output(2, label_shape, &weights));
    TF_RETURN_IF_ERROR(ctx->allocate_output(3, {u, max_rows_}, &time));
    TF_RETURN_IF_ERROR(ctx->allocate_output(4, {u, max_rows_}, &event));
    TF_RETURN_IF_ERROR(ctx->allocate_output(5, {u}, &count));
    const auto counts = count->flat<int32_t>();
    store->Get(ctx->input(1).flat<int64_t>().data(), static_cast<size_t>(u),
               ctx->input(2).scalar<int64_t>()(),
               {static_cast<int32_t>(max_rows_), h->flat<float>().data(),
                labels->flat<float>().data(), weights->flat<float>().data(),
                time->flat<int64_t>().data(), event->flat<int64_t>().data(),
                counts.data()});
    for (int64_t i = 0; i < u; ++i) {
      Clear(h->flat<float>().data(), i, counts(i), dim_);
      Clear(labels->flat<float>().data(), i, counts(i), num_labels_);
      Clear(weights->flat<float>().data(), i, counts(i), num_labels_);
      Clear(time->flat<int64_t>().data(), i, counts(i), 1);
      Clear(event->flat<int64_t>().data(), i, counts(i), 1);
    }
    return absl::OkStatus();
  }

  // Sets to zero what lies behind the first rows of task i.
  template <typename T>
  void Clear(T* rows, int64_t i, int64_t count, int64_t width) const {
    std::fill(rows + (i * max_rows_ + count) * width,
              rows + (i + 1) * max_rows_ * width, T{0});
  }

  int64_t dim_, num_labels_, max_rows_;
};

class StatsOp : public StoreOp {
 public:
  using StoreOp::StoreOp;

 private:
  absl::Status Run(OpKernelContext* ctx, SupportStore* store) override {
    const int64_t b = ctx->input(1).NumElements();
    TF_RETURN_IF_ERROR(CheckShape(ctx, 1, "task_id", {b}));
    const SupportStats s = store->Stats();
    const int64_t values[] = {
        s.tasks,   s.rows,    s.bytes,         s.hits,         s.misses,
        s.refused, s.evicted, s.damaged_bytes, s.write_errors, s.read_errors};
    constexpr int64_t m = kNumSupportStats;
    static_assert(std::size(values) == m);
    Tensor* stats = nullptr;
    TF_RETURN_IF_ERROR(ctx->allocate_output(0, {b, m}, &stats));
    for (int64_t i = 0; i < b; ++i) {
      std::copy(values, values + m, stats->flat<int64_t>().data() + i * m);
    }
    return absl::OkStatus();
  }
};

// Export or import.
template <bool (SupportStore::*kWork)(const std::string&, std::string*)>
class FileOp : public StoreOp {
 public:
  using StoreOp::StoreOp;

 private:
  bool Waits(const SupportStore&) const override { return true; }

  absl::Status Run(OpKernelContext* ctx, SupportStore* store) override {
    TF_RETURN_IF_ERROR(CheckShape(ctx, 1, "filename", {}));
    const std::string path = ctx->input(1).scalar<tensorflow::tstring>()();
    std::string error;
    if ((store->*kWork)(path, &error)) return absl::OkStatus();
    return absl::FailedPreconditionError(absl::StrCat(error, "."));
  }
};

REGISTER_KERNEL_BUILDER(
    Name("Qianmo>SupportStore").Device(tensorflow::DEVICE_CPU),
    tensorflow::ResourceHandleOp<SupportResource>);
REGISTER_KERNEL_BUILDER(
    Name("Qianmo>SupportOpen").Device(tensorflow::DEVICE_CPU), OpenOp);
REGISTER_KERNEL_BUILDER(
    Name("Qianmo>SupportPut").Device(tensorflow::DEVICE_CPU), PutOp);
REGISTER_KERNEL_BUILDER(
    Name("Qianmo>SupportGet").Device(tensorflow::DEVICE_CPU), GetOp);
REGISTER_KERNEL_BUILDER(
    Name("Qianmo>SupportStats").Device(tensorflow::DEVICE_CPU), StatsOp);
REGISTER_KERNEL_BUILDER(
    Name("Qianmo>SupportExport").Device(tensorflow::DEVICE_CPU),
    FileOp<&SupportStore::Export>);
REGISTER_KERNEL_BUILDER(
    Name("Qianmo>SupportImport").Device(tensorflow::DEVICE_CPU),
    FileOp<&SupportStore::Import>);

}  // namespace
}  // namespace qianmo
