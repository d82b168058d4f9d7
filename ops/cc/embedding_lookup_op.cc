#include "absl/strings/str_cat.h"
#include "ops/cc/embedding_lookup.h"
#include "tensorflow/core/framework/common_shape_fns.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"

namespace qianmo {

absl::Status LookupAttrs::Check(size_t ids, size_t lengths,
                                size_t weights) const {
  size_t pooled = 0, with_weights = 0;
  for (const std::string& how : pooling) pooled += how != "none";
  for (const bool is_weighted : weighted) with_weights += is_weighted;
  if (tables.size() != ids || dims.size() != ids || pooling.size() != ids ||
      weighted.size() != ids || pooled != lengths || with_weights != weights) {
    return absl::InvalidArgumentError(absl::StrCat(
        "`tables`, `dims`, `pooling` and `weighted` should have one item for ",
        "each of `ids`, `lengths` one for each that is pooled, and `weights` ",
        "one for each that is weighted. Received: ", ids, " ids, ",
        tables.size(), " tables, ", dims.size(), " dims, ", pooling.size(),
        " pooling, ", pooled, " of it not none, ", lengths, " lengths, ",
        weighted.size(), " weighted, ", with_weights, " of it true, ", weights,
        " weights"));
  }
  for (size_t i = 0; i < ids; ++i) {
    if (dims[i] < 1) {
      return absl::InvalidArgumentError(
          absl::StrCat("`dims` should be >= 1. Received: ", dims[i]));
    }
    if (weighted[i] && (pooling[i] == "none" || pooling[i] == "max")) {
      return absl::InvalidArgumentError(absl::StrCat(
          "Weights should stand where `pooling` is mean, sum or sqrtn. ",
          "Received: ", pooling[i]));
    }
  }
  return absl::OkStatus();
}

namespace {

using ::tensorflow::shape_inference::DimensionHandle;
using ::tensorflow::shape_inference::InferenceContext;
using ::tensorflow::shape_inference::ShapeHandle;

absl::Status EmbeddingLookupShape(InferenceContext* c) {
  std::vector<ShapeHandle> ids, lengths, weights;
  TF_RETURN_IF_ERROR(c->input("ids", &ids));
  TF_RETURN_IF_ERROR(c->input("lengths", &lengths));
  TF_RETURN_IF_ERROR(c->input("weights", &weights));
  LookupAttrs attrs;
  TF_RETURN_IF_ERROR(attrs.Get(c));
  TF_RETURN_IF_ERROR(attrs.Check(ids.size(), lengths.size(), weights.size()));
  std::vector<ShapeHandle> vectors;
  size_t length = 0, weight = 0;
  for (size_t i = 0; i < ids.size(); ++i) {
    ShapeHandle rows = ids[i];
    if (attrs.pooling[i] != "none") {
      ShapeHandle one;
      DimensionHandle batch;
      TF_RETURN_IF_ERROR(c->WithRank(ids[i], 2, &rows));
      TF_RETURN_IF_ERROR(c->WithRank(lengths[length++], 1, &one));
      TF_RETURN_IF_ERROR(c->Merge(c->Dim(rows, 0), c->Dim(one, 0), &batch));
      if (attrs.weighted[i]) {
        TF_RETURN_IF_ERROR(c->Merge(rows, weights[weight++], &rows));
      }
      rows = c->Vector(batch);
    }
    vectors.emplace_back();
    TF_RETURN_IF_ERROR(
        c->Concatenate(rows, c->Vector(attrs.dims[i]), &vectors.back()));
  }
  return c->set_output("vectors", vectors);
}

}  // namespace

REGISTER_OP("Qianmo>EmbeddingStoreHandle")
    .Output("store: resource")
    .Attr("container: string = ''")
    .Attr("shared_name: string = ''")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::ScalarShape)
    .Doc(R"doc(
A handle to an embedding store, which `Qianmo>EmbeddingStoreOpen` opens.
)doc");

REGISTER_OP("Qianmo>EmbeddingStoreOpen")
    .Input("store: resource")
    .Input("path: string")
    .Attr("space: int >= 0")
    .Attr("on_mismatch: {'fall_back', 'refuse'}")
    .Attr("verify: bool")
    .SetIsStateful()
    .SetShapeFn([](InferenceContext* c) {
      ShapeHandle scalar;
      return c->WithRank(c->input(1), 0, &scalar);
    })
    .Doc(R"doc(
Opens a source of embedding versions, and follows the version it publishes.

Graphs of a process that open the same one share it.

path: a folder, the URL of a Redis, or a file whose only line names one of them,
  a folder from the file's own folder on.
space: accepts embedding versions of this space; 0 for all.
on_mismatch: what to read when the version published is of another space:
  'fall_back' is the newest one there that is of this space, 'refuse' none, so
  that lookups fail until one is published. Without any both fail here.
verify: read every byte of a version and compare the checksums before it is
  used.
)doc");

REGISTER_OP("Qianmo>EmbeddingStoreRowsLost")
    .Input("store: resource")
    .Output("rows: int64")
    .SetIsStateful()
    .SetShapeFn(tensorflow::shape_inference::ScalarShape)
    .Doc(R"doc(
Counts the rows that a store could not get from a Redis since it is open.

Of a store that fails requests then, these are the rows of the failed requests;
otherwise each of them was answered by its table's default vector.
)doc");

REGISTER_OP("Qianmo>EmbeddingLookup")
    .Input("store: resource")
    .Input("ids: N * int64")
    .Input("lengths: M * int64")
    .Input("weights: W * float")
    .Output("vectors: N * float")
    .Attr("N: int >= 1")
    .Attr("M: int >= 0")
    .Attr("W: int >= 0")
    .Attr("tables: list(string)")
    .Attr("dims: list(int)")
    .Attr("pooling: list({'none', 'mean', 'sum', 'sqrtn', 'max'})")
    .Attr("weighted: list(bool)")
    .Attr("missing: {'default', 'zero', 'error'}")
    .Attr("timeout_ms: int >= 0")
    .SetShapeFn(EmbeddingLookupShape)
    .Doc(R"doc(
Reads vectors of several tables from one embedding version of a store.

An id may stand any number of times; each place gets the vector. The work runs
on threads of its own as long as rows come from a disk or from a Redis, so that
none of TensorFlow's waits for them. It ends early when the step is cancelled or
its time is up.

ids: of each table any shape, or [B, L] where it is pooled.
lengths: how many ids of each row to pool, from the left, [B]; one for each of
  `ids` that is pooled, in their order. Clipped to [0, L].
weights: of the ids, [B, L]; one for each of `ids` that is weighted.
vectors: of each table [..., D], or [B, D] where it is pooled; a list of length
  0 gives zeros.
tables: the names of the tables.
dims: D of each.
pooling: 'none', or how a row of ids becomes one vector; 'sqrtn' is
  sum / sqrt(length). With weights, the sum of weight * vector over the sum of
  weights, over nothing, or over the root of the sum of their squares.
weighted: which of them have weights; not those of pooling 'none' and 'max'.
missing: what an id without a row gives: the vector of the table's default id,
  zeros, or an error.
timeout_ms: 0 for no limit.
)doc");

}  // namespace qianmo
