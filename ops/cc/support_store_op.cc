#include "ops/cc/support_store.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace qianmo {
namespace {

using ::tensorflow::shape_inference::DimensionHandle;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

absl::Status PutShape(InferenceContext* c) {
  // Inputs 1 ... 7 share the first dimension; labels and weights the second.
  constexpr int kRanks[] = {0, 1, 2, 2, 2, 1, 1, 1};
  DimensionHandle n = c->UnknownDim();
  for (int i = 1; i <= 7; ++i) {
    ShapeHandle shape;
    TF_RETURN_IF_ERROR(c->WithRank(c->input(i), kRanks[i], &shape));
    TF_RETURN_IF_ERROR(c->Merge(n, c->Dim(shape, 0), &n));
  }
  ShapeHandle labels;
  TF_RETURN_IF_ERROR(c->Merge(c->input(3), c->input(4), &labels));
  c->set_output(0, c->Vector(n));
  return absl::OkStatus();
}

absl::Status GetShape(InferenceContext* c) {
  ShapeHandle tasks, version;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 1, &tasks));
  TF_RETURN_IF_ERROR(c->WithRank(c->input(2), 0, &version));
  int64_t dim, num_labels, max_rows;
  TF_RETURN_IF_ERROR(c->GetAttr("dim", &dim));
  TF_RETURN_IF_ERROR(c->GetAttr("num_labels", &num_labels));
  TF_RETURN_IF_ERROR(c->GetAttr("max_rows", &max_rows));
  const DimensionHandle u = c->Dim(tasks, 0);
  c->set_output(0, c->MakeShape({u, max_rows, dim}));
  c->set_output(1, c->MakeShape({u, max_rows, num_labels}));
  c->set_output(2, c->MakeShape({u, max_rows, num_labels}));
  c->set_output(3, c->MakeShape({u, max_rows}));
  c->set_output(4, c->MakeShape({u, max_rows}));
  c->set_output(5, c->Vector(u));
  return absl::OkStatus();
}

absl::Status StatsShape(InferenceContext* c) {
  ShapeHandle rows;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(1), 1, &rows));
  c->set_output(0, c->MakeShape({c->Dim(rows, 0), kNumSupportStats}));
  return absl::OkStatus();
}

absl::Status FileShape(InferenceContext* c) {
  ShapeHandle filename;
  return c->WithRank(c->input(1), 0, &filename);
}

}  // namespace

REGISTER_OP("Qianmo>SupportStore")
    .Output("handle: resource")
    .Attr("container: string = ''")
    .Attr("shared_name: string = ''")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::ScalarShape)
    .Doc(R"doc(
A handle to a support store, which `Qianmo>SupportOpen` opens.
)doc");

REGISTER_OP("Qianmo>SupportOpen")
    .Input("handle: resource")
    .Attr("store: string")
    .Attr("path: string")
    .Attr("dim: int >= 1")
    .Attr("num_labels: int >= 1")
    .Attr("max_rows: int >= 1")
    .Attr("ttl_seconds: float")
    .Attr("max_tasks: int >= 0")
    .Attr("max_bytes: int >= 0")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::NoOutputs)
    .Doc(R"doc(
Opens the support store of that name, or joins those in the process who have it.

Holders of one name agree on path, dim, num_labels and max_rows; the limits are
those of the latest. A store closes when the last session that holds it ends.

store: its name in this process.
path: folder of its files, or URL of a Redis that keeps it for all processes;
  empty keeps it in memory only.
dim: floats of a row's vector.
num_labels: labels, and label weights, of a row.
max_rows: rows kept of a task, the last by event time.
ttl_seconds: rows written longer ago are not returned; 0 for ever.
max_tasks: the tasks not written for longest go beyond it; 0 for no bound, as of
  a Redis.
max_bytes: the same, of rows and index; 0 for no bound, as of a Redis.
)doc");

REGISTER_OP("Qianmo>SupportPut")
    .Input("handle: resource")
    .Input("task_id: int64")
    .Input("h: float")
    .Input("labels: float")
    .Input("weights: float")
    .Input("time: int64")
    .Input("event_id: int64")
    .Input("version: int64")
    .Output("status: int32")
    .SetIsStateful()
    .SetShapeFn(PutShape)
    .Doc(R"doc(
Stores rows; one of the same task, event time and event id is replaced.

Bits of the status: 1 the time is not positive, 2 h is not finite, 4 a label or
weight is not finite, or a weight is negative, 8 the task is full of rows of
later events, 16 no memory, 32 the Redis did not store it. A row with any of
them is not stored; its neighbours are.

task_id: [N].
h: [N, dim].
labels: [N, num_labels].
weights: [N, num_labels]; where one is 0 the label is undefined.
time: [N], of the event, positive.
event_id: [N], which tells events of one time apart.
version: [N], of the bottom that made h.
status: [N], 0 for a row that was stored.
)doc");

REGISTER_OP("Qianmo>SupportGet")
    .Input("handle: resource")
    .Input("task_id: int64")
    .Input("version: int64")
    .Output("h: float")
    .Output("labels: float")
    .Output("weights: float")
    .Output("time: int64")
    .Output("event_id: int64")
    .Output("count: int32")
    .Attr("dim: int >= 1")
    .Attr("num_labels: int >= 1")
    .Attr("max_rows: int >= 1")
    .SetIsStateful()
    .SetShapeFn(GetShape)
    .Doc(R"doc(
Returns the last rows of tasks by (time, event_id), padded with zeros. A task whose
rows a Redis does not let read has none.

task_id: [U].
version: of the bottom; rows of another are left out.
h: [U, max_rows, dim].
labels: [U, max_rows, num_labels].
weights: [U, max_rows, num_labels].
time: [U, max_rows].
event_id: [U, max_rows].
count: [U], rows found.
)doc");

REGISTER_OP("Qianmo>SupportStats")
    .Input("handle: resource")
    .Input("task_id: int64")
    .Output("stats: int64")
    .SetIsStateful()
    .SetShapeFn(StatsShape)
    .Doc(R"doc(
Counts what a support store holds and did; every row is the same.

task_id: [B], whose values do not matter.
stats: [B, 10]: tasks, rows, bytes, hits, misses, refused, evicted,
  damaged_bytes, write_errors, read_errors; -1 for what it cannot tell.
)doc");

REGISTER_OP("Qianmo>SupportExport")
    .Input("handle: resource")
    .Input("filename: string")
    .SetIsStateful()
    .SetShapeFn(FileShape)
    .Doc(R"doc(
Writes all rows of a support store to a file, while it is used.
)doc");

REGISTER_OP("Qianmo>SupportImport")
    .Input("handle: resource")
    .Input("filename: string")
    .SetIsStateful()
    .SetShapeFn(FileShape)
    .Doc(R"doc(
Adds the rows of an exported file, with their times of writing.
)doc");

}  // namespace qianmo
