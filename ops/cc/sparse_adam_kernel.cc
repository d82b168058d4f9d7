#define EIGEN_USE_THREADS  // Eigen's switch for its ThreadPoolDevice

#include <cmath>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "ops/cc/sparse_adam.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/resource_mgr.h"
#include "tensorflow/core/framework/resource_var.h"
#include "tensorflow/core/kernels/training_op_helpers.h"
#include "tensorflow/core/platform/threadpool.h"

namespace qianmo {
namespace {

using ::tensorflow::OpKernelContext;
using ::tensorflow::Tensor;
using CPUDevice = ::Eigen::ThreadPoolDevice;

class SparseAdamOp : public tensorflow::OpKernel {
 public:
  using OpKernel::OpKernel;

  void Compute(OpKernelContext* ctx) override {
    // Held to the end: reads of the rows wait, and so do other writers.
    const auto locks =
        tensorflow::MaybeLockVariableInputMutexesInOrder<CPUDevice, float>(
            ctx, /*do_lock=*/true, /*sparse=*/true, {0, 1, 2});
    if (!ctx->status().ok()) return;
    OP_REQUIRES_OK(ctx, Update(ctx));
  }

 private:
  absl::Status Update(OpKernelContext* ctx) {
    Tensor variables[3];
    for (int i = 0; i < 3; ++i) {
      Tensor& each = variables[i];
      TF_RETURN_IF_ERROR(
          tensorflow::GetInputTensorFromVariable<CPUDevice, float>(
              ctx, i, /*lock_held=*/true, /*sparse=*/true, &each));
      if (!each.IsInitialized() || each.dtype() != tensorflow::DT_FLOAT ||
          each.dims() < 1 || each.shape() != variables[0].shape()) {
        return absl::FailedPreconditionError(absl::StrCat(
            "`", type_string(), "` should get three initialised variables ",
            "[num_rows, ...] of float and of one shape. Received: ",
            each.DebugString(0), " beside ", variables[0].DebugString(0)));
      }
    }
    const Tensor& indices = ctx->input(3);
    const Tensor& gradients = ctx->input(4);
    const int64_t num_rows = variables[0].dim_size(0);
    const int64_t n = indices.NumElements();
    tensorflow::TensorShape expected = variables[0].shape();
    if (indices.dims() == 1) expected.set_dim(0, n);
    if (indices.dims() != 1 || gradients.shape() != expected ||
        n > std::numeric_limits<int32_t>::max()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "`gradients` should have one row of the variable's shape ",
          variables[0].shape().DebugString(), " for each of `indices` [n], n ",
          "below 2^31. Received: gradients ", gradients.shape().DebugString(),
          ", indices ", indices.shape().DebugString()));
    }
    for (int i = 5; i < ctx->num_inputs(); ++i) {
      if (ctx->input(i).NumElements() != 1) {
        return absl::InvalidArgumentError(
            absl::StrCat("Input ", i, " should be a scalar. Received: ",
                         ctx->input(i).shape().DebugString()));
      }
    }

    const auto rows = indices.flat<int64_t>();
    for (int64_t i = 0; i < n; ++i) {
      if (rows(i) < 0 || rows(i) >= num_rows) {
        return absl::InvalidArgumentError(
            absl::StrCat("`indices` should be in [0, ", num_rows,
                         "). Received: ", rows(i), " at position ", i));
      }
    }

    const double t = static_cast<double>(ctx->input(6).flat<int64_t>()(0));
    const double beta_1 = ctx->input(7).flat<double>()(0);
    const double beta_2 = ctx->input(8).flat<double>()(0);
    const double rate = ctx->input(5).flat<float>()(0);
    const AdamStep step = {
        static_cast<float>(rate * std::sqrt(1 - std::pow(beta_2, t)) /
                           (1 - std::pow(beta_1, t))),
        static_cast<float>(1 - beta_1),
        static_cast<float>(1 - beta_2),
        static_cast<float>(ctx->input(9).flat<double>()(0)),
    };

    const RowGroups groups =
        GroupRows(rows.data(), static_cast<int32_t>(n), num_rows);
    const int64_t dim = n == 0 ? 0 : gradients.NumElements() / n;
    float* const w = variables[0].flat<float>().data();
    float* const m = variables[1].flat<float>().data();
    float* const v = variables[2].flat<float>().data();
    const float* const g = gradients.flat<float>().data();
    const auto num_groups = static_cast<int64_t>(groups.rows.size());
    if (num_groups == 0) return absl::OkStatus();
    const int64_t cycles_of_a_row = 100 + dim * (20 + n / num_groups);
    ctx->device()->tensorflow_cpu_worker_threads()->workers->ParallelFor(
        num_groups,
        tsl::thread::ThreadPool::SchedulingParams::Adaptive(cycles_of_a_row),
        [&](int64_t begin, int64_t end) {
          SparseAdamRows(groups, begin, end, g, dim, step, w, m, v);
        });
    return absl::OkStatus();
  }
};

REGISTER_KERNEL_BUILDER(
    Name("Qianmo>SparseAdam").Device(tensorflow::DEVICE_CPU), SparseAdamOp);

}  // namespace
}  // namespace qianmo
