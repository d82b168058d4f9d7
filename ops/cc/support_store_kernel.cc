#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "ops/cc/support_store.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"

namespace qianmo {
namespace {

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

class PutOp : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* ctx) override {
    std::shared_ptr<SupportStore> store;
    OP_REQUIRES_OK(ctx, StoreOf(ctx, &store));
    const int64_t n = ctx->input(1).NumElements();
    const int64_t dim = store->shape().dim;
    const int64_t num_labels = store->shape().num_labels;
    OP_REQUIRES_OK(ctx, CheckShape(ctx, 1, "task_id", {n}));
    OP_REQUIRES_OK(ctx, CheckShape(ctx, 2, "h", {n, dim}));
    OP_REQUIRES_OK(ctx, CheckShape(ctx, 3, "labels", {n, num_labels}));
    OP_REQUIRES_OK(ctx, CheckShape(ctx, 4, "weights", {n, num_labels}));
    OP_REQUIRES_OK(ctx, CheckShape(ctx, 5, "time", {n}));
    OP_REQUIRES_OK(ctx, CheckShape(ctx, 6, "version", {n}));
    Tensor* status = nullptr;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, {n}, &status));

    const auto task = ctx->input(1).flat<int64_t>();
    const float* const h = ctx->input(2).flat<float>().data();
    const float* const labels = ctx->input(3).flat<float>().data();
    const float* const weights = ctx->input(4).flat<float>().data();
    const auto time = ctx->input(5).flat<int64_t>();
    const auto version = ctx->input(6).flat<int64_t>();
    auto out = status->flat<int32_t>();
    for (int64_t i = 0; i < n; ++i) {
      out(i) = store->Put(task(i), h + i * dim, labels + i * num_labels,
                          weights + i * num_labels, time(i), version(i));
    }
    store->AfterPut();
  }
};

class GetOp : public OpKernel {
 public:
  explicit GetOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("dim", &dim_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("num_labels", &num_labels_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("max_rows", &max_rows_));
  }

  void Compute(OpKernelContext* ctx) override {
    std::shared_ptr<SupportStore> store;
    OP_REQUIRES_OK(ctx, StoreOf(ctx, &store));
    OP_REQUIRES(
        ctx,
        store->shape().dim == dim_ && store->shape().num_labels == num_labels_,
        absl::InvalidArgumentError(
            absl::StrCat("`dim` and `num_labels` should be the store's, ",
                         store->shape().dim, " and ", store->shape().num_labels,
                         ". Received: ", dim_, " and ", num_labels_)));
    const int64_t u = ctx->input(1).NumElements();
    OP_REQUIRES_OK(ctx, CheckShape(ctx, 1, "task_id", {u}));
    OP_REQUIRES_OK(ctx, CheckShape(ctx, 2, "version", {}));
    Tensor *h = nullptr, *labels = nullptr, *weights = nullptr, *time = nullptr,
           *count = nullptr;
    const TensorShape label_shape({u, max_rows_, num_labels_});
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, {u, max_rows_, dim_}, &h));
    OP_REQUIRES_OK(ctx, ctx->allocate_output(1, label_shape, &labels));
    OP_REQUIRES_OK(ctx, ctx->allocate_output(2, label_shape, &weights));
    OP_REQUIRES_OK(ctx, ctx->allocate_output(3, {u, max_rows_}, &time));
    OP_REQUIRES_OK(ctx, ctx->allocate_output(4, {u}, &count));

    const auto task = ctx->input(1).flat<int64_t>();
    const int64_t version = ctx->input(2).scalar<int64_t>()();
    for (int64_t i = 0; i < u; ++i) {
      float* const h_i = At(h, i, dim_);
      float* const labels_i = At(labels, i, num_labels_);
      float* const weights_i = At(weights, i, num_labels_);
      int64_t* const time_i = time->flat<int64_t>().data() + i * max_rows_;
      const int32_t n = store->Get(task(i), version, max_rows_, h_i, labels_i,
                                   weights_i, time_i);
      count->flat<int32_t>()(i) = n;
      std::fill(h_i + n * dim_, h_i + max_rows_ * dim_, 0.0f);
      std::fill(labels_i + n * num_labels_, labels_i + max_rows_ * num_labels_,
                0.0f);
      std::fill(weights_i + n * num_labels_,
                weights_i + max_rows_ * num_labels_, 0.0f);
      std::fill(time_i + n, time_i + max_rows_, int64_t{0});
    }
  }

 private:
  // Where the rows of task i begin in a tensor [U, max_rows, width].
  float* At(Tensor* tensor, int64_t i, int64_t width) const {
    return tensor->flat<float>().data() + i * max_rows_ * width;
  }

  int64_t dim_, num_labels_, max_rows_;
};

class StatsOp : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* ctx) override {
    std::shared_ptr<SupportStore> store;
    OP_REQUIRES_OK(ctx, StoreOf(ctx, &store));
    const int64_t b = ctx->input(1).NumElements();
    OP_REQUIRES_OK(ctx, CheckShape(ctx, 1, "task_id", {b}));
    const SupportStats s = store->Stats();
    const int64_t values[] = {s.tasks,   s.rows,          s.bytes,
                              s.hits,    s.misses,        s.refused,
                              s.evicted, s.damaged_bytes, s.write_errors};
    const int64_t m = std::size(values);
    Tensor* stats = nullptr;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, {b, m}, &stats));
    for (int64_t i = 0; i < b; ++i) {
      std::copy(values, values + m, stats->flat<int64_t>().data() + i * m);
    }
  }
};

// Export or import.
template <bool (SupportStore::*kWork)(const std::string&, std::string*)>
class FileOp : public OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* ctx) override {
    std::shared_ptr<SupportStore> store;
    OP_REQUIRES_OK(ctx, StoreOf(ctx, &store));
    OP_REQUIRES_OK(ctx, CheckShape(ctx, 1, "filename", {}));
    const std::string path = ctx->input(1).scalar<tensorflow::tstring>()();
    std::string error;
    OP_REQUIRES(ctx, (store.get()->*kWork)(path, &error),
                absl::FailedPreconditionError(absl::StrCat(error, ".")));
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
