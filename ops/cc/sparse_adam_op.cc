#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace qianmo {
namespace {

using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

absl::Status SparseAdamShape(InferenceContext* c) {
  ShapeHandle indices, gradients, scalar;
  TF_RETURN_IF_ERROR(c->WithRank(c->input(3), 1, &indices));
  TF_RETURN_IF_ERROR(c->WithRankAtLeast(c->input(4), 1, &gradients));
  tensorflow::shape_inference::DimensionHandle n;
  TF_RETURN_IF_ERROR(c->Merge(c->Dim(indices, 0), c->Dim(gradients, 0), &n));
  for (int i = 5; i < c->num_inputs(); ++i) {
    TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 0, &scalar));
  }
  return absl::OkStatus();
}

}  // namespace

REGISTER_OP("Qianmo>SparseAdam")
    .Input("var: resource")
    .Input("m: resource")
    .Input("v: resource")
    .Input("indices: int64")
    .Input("gradients: float")
    .Input("learning_rate: float")
    .Input("step: int64")
    .Input("beta_1: double")
    .Input("beta_2: double")
    .Input("epsilon: double")
    .SetIsStateful()
    .SetShapeFn(SparseAdamShape)
    .Doc(R"doc(
Moves the rows `indices` of `var` by Adam, and their moments `m` and `v`.

Gradients of a row named more than once are summed first, in their order. Rows
that are not named stay as they are. An index outside of `var` is an error, and
then nothing is written.

var: [num_rows, ...], float.
m: the first moment, of the shape of `var`.
v: the second moment, of the shape of `var`.
indices: [n].
gradients: [n, ...], the gradient of each named row.
step: the number of this step, from 1 on, for the bias correction.
)doc");

}  // namespace qianmo
