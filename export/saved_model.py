"""SavedModels that stock TensorFlow Serving loads: the whole graph, or it without embeddings.

Rules that its batching sets, and that every signature here keeps: each input and output is
[B, ...]; rows are independent of each other; lists come with lengths, never masks; a row that
cannot be read gets a status and its neighbours are untouched.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework import op_def_registry
from tensorflow_serving.apis import model_pb2, predict_pb2, prediction_log_pb2

from qianmo.export.calibration import NONE, Calibration, calibrated, tolerance_factor
from qianmo.export.precision import served_in_full
from qianmo.export.publishing import (
    LOOKUP,
    NO_ORIGIN,
    Origin,
    drafting,
    drafting_fed,
    write_origin,
    write_serving_files,
)
from qianmo.export.publishing import ExportError as ExportError
from qianmo.export.widths import fitted
from qianmo.layers.encode import BAD_DENSE, OK, completed
from qianmo.layers.label_heads import label_moments, predictions
from qianmo.layers.schema import Schema
from qianmo.layers.task_key import task_key
from qianmo.models.ranker import Ranker

BAD_SCORE = 4  # a score was NaN or infinite and is answered as 0
BAD_EMBEDDING = 256  # a vector was NaN or infinite and was read as zeros
TOLERANCE = 1e-6
STATUS = "status"
EXTRA = "assets.extra"  # of a version: files for the server, and the origin
DEFAULT = "serving_default"
# Registered in every TensorFlow, but they call back into a Python that a server does not have.
PYTHON_OPS = frozenset({"PyFunc", "PyFuncStateless", "EagerPyFunc"})

Rows = Mapping[str, np.ndarray]
Specs = Mapping[str, tf.TensorSpec]
Signature = Callable[..., dict[str, tf.Tensor]]


def raw_specs(schema: Schema) -> dict[str, tf.TensorSpec]:
    """Serving inputs for raw features: their own names and dtypes."""
    specs: dict[str, tf.TensorSpec] = {}
    for f in schema.categorical:
        shape = [None, f.max_length] if f.is_list else [None]
        specs[f.name] = tf.TensorSpec(shape, tf.as_dtype(f.dtype), f.name)
        if f.is_list:
            specs[f.length_name] = tf.TensorSpec([None], tf.int64, f.length_name)
    for d in schema.dense:
        specs[d.name] = tf.TensorSpec([None], tf.float32, d.name)
    return specs


def with_task(schema: Schema, specs: Specs) -> dict[str, tf.TensorSpec]:
    """Inputs with the task's column, which may be a feature among them."""
    name = schema.task_id
    return {**specs, name: tf.TensorSpec([None], tf.as_dtype(schema.task_dtype), name)}


def task_keys(schema: Schema, inputs: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """The numbers of the rows' tasks, int64 [B]; strings are known by their `task_key`."""
    task = inputs[schema.task_id]
    return task_key(task) if schema.task_dtype == "string" else task


def domain_input(model: Ranker, calibration: Calibration = NONE) -> str:
    """Name under which a graph without embeddings gets the raw domain; empty if it needs none.

    The domain's own name is that of its vector.
    """
    scaled = any(scaling.reads_domain for scaling in calibration.values())
    owned = any(d.domains for d in model.schema.dense)
    reads = any(getattr(layer, "reads_domain", False) for layer in model.submodules)
    return f"{model.schema.domain}_id" if owned or reads or scaled else ""


def vector_specs(model: Ranker, calibration: Calibration = NONE) -> dict[str, tf.TensorSpec]:
    """Serving inputs where vectors stand for the categorical features, under the same names.

    Where the graph reads the rows' domain, its raw value is one input more (`domain_input`).
    """
    specs = {}
    for f in model.schema.categorical:
        specs[f.name] = tf.TensorSpec([None, f.dim + model.embed.linear_dim], tf.float32, f.name)
    for d in model.schema.dense:
        specs[d.name] = tf.TensorSpec([None], tf.float32, d.name)
    if name := domain_input(model, calibration):
        if name in specs:
            raise ExportError(f"feature `{name}` has the name of the input for the raw domain.")
        specs[name] = tf.TensorSpec([None], tf.as_dtype(model.schema.domain_dtype), name)
    return specs


def answer(schema: Schema, logits: tf.Tensor, status: tf.Tensor) -> dict[str, tf.Tensor]:
    """Outputs of a scoring signature: what is predicted of each label, and the rows' status.

    That is the probability of a binary label, and the mean of a rating, in its own units.
    """
    scores = predictions(schema, tf.cast(logits, tf.float32))
    finite = tf.math.is_finite(scores)
    scores = tf.where(finite, scores, 0.0)
    columns = dict(zip(schema.labels, tf.unstack(scores, axis=1), strict=True))
    return {**columns, STATUS: status | tf.where(tf.reduce_all(finite, 1), OK, BAD_SCORE)}


def scorer(model: Ranker, head: str, calibration: Calibration = NONE) -> Signature:
    """The plain score of a head, from raw features."""

    def score(**features: tf.Tensor) -> dict[str, tf.Tensor]:
        output, status = model.one_head(features, head)
        logits = calibrated(model, calibration.get(head), output.logits, features)
        return answer(model.schema, logits, status)

    return score


def _fed_scorer(model: Ranker, head: str, calibration: Calibration) -> Signature:
    def score(**features: tf.Tensor) -> dict[str, tf.Tensor]:
        batch = tf.shape(next(iter(features.values())))[0]
        dense, status = tf.zeros([batch, 0]), tf.zeros([batch], tf.int32)
        domain, raw = tf.zeros([batch], tf.int64), features
        if name := domain_input(model, calibration):
            raw = {model.schema.domain: features[name]}
            domain = model.encode.domain(raw)
        if model.schema.dense:
            dense, finite = model.encode.dense(features, domain)
            status |= tf.where(finite, OK, BAD_DENSE)
        vectors = {}
        for f in model.schema.categorical:
            finite = tf.reduce_all(tf.math.is_finite(features[f.name]), 1)
            status |= tf.where(finite, OK, BAD_EMBEDDING)
            vectors[f.name] = tf.where(finite[:, None], features[f.name], 0.0)
        embedded = model.embed.assemble(vectors, dense, domain)
        logits = model.heads(embedded, (head,))[head].logits
        logits = calibrated(model, calibration.get(head), logits, raw)
        return answer(model.schema, logits, status)

    return score


def _lookup(model: Ranker) -> Signature:
    def lookup(**features: tf.Tensor) -> dict[str, tf.Tensor]:
        # Dense features do not cross this seam; constants stand in for them.
        encoded = model.encode(completed(model.schema, features))
        return {**model.embed.vectors(encoded), STATUS: encoded.status}

    return lookup


def _save(
    folder: pathlib.Path,
    model: Ranker,
    functions: Mapping[str, Signature],
    specs: Mapping[str, Specs],
    module: tf.Module,
) -> None:
    """Writes signatures with the variables and lookup tables that they use, and no others."""
    concrete = {
        name: tf.function(f).get_concrete_function(**specs[name]) for name, f in functions.items()
    }
    module.used = list({v.ref(): v for f in concrete.values() for v in f.graph.variables}.values())
    captured = {id(x) for f in concrete.values() for x, _ in f.graph.captures}
    tables = model.encode.vocabularies.values()
    module.lookups = [table for table in tables if id(table.resource_handle) in captured]
    tf.saved_model.save(module, str(folder), signatures=concrete)


def op_types(version_dir: str | os.PathLike[str]) -> set[str]:
    """The op types in a SavedModel's graph and its functions."""
    proto = saved_model_pb2.SavedModel()
    proto.ParseFromString((pathlib.Path(version_dir) / "saved_model.pb").read_bytes())
    graph = proto.meta_graphs[0].graph_def
    functions = {f.signature.name for f in graph.library.function}
    nodes = [*graph.node, *(n for f in graph.library.function for n in f.node_def)]
    return {n.op for n in nodes} - functions


def _check_ops(version_dir: pathlib.Path, own_ops: bool) -> None:
    foreign = sorted(
        op
        for op in op_types(version_dir)
        if not (own_ops and op.startswith("Qianmo>"))
        and (op in PYTHON_OPS or ">" in op or op_def_registry.get(op) is None)
    )
    if foreign:
        raise ExportError(f"The graph holds ops that stock TensorFlow Serving lacks: {foreign}.")


def _write_warmup(version_dir: pathlib.Path, name: str, inputs: Mapping[str, Rows]) -> None:
    """One record for each signature: a version that cannot answer then fails at load."""
    folder = version_dir / EXTRA
    folder.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(folder / "tf_serving_warmup_requests")) as writer:
        for signature, rows in inputs.items():
            request = predict_pb2.PredictRequest(
                model_spec=model_pb2.ModelSpec(name=name, signature_name=signature)
            )
            for key, value in rows.items():
                request.inputs[key].CopyFrom(tf.make_tensor_proto(value[:1]))
            log = prediction_log_pb2.PredictionLog(
                predict_log=prediction_log_pb2.PredictLog(request=request)
            )
            writer.write(log.SerializeToString())


@contextlib.contextmanager
def session(version_dir: str | os.PathLike[str]) -> Iterator[Callable[[str, Rows], Rows]]:
    """Opens a SavedModel by the session loader, as TensorFlow Serving does.

    Yields:
      A function (signature name, inputs) -> outputs.
    """
    with tf.Graph().as_default(), tf.compat.v1.Session() as sess:
        meta = tf.compat.v1.saved_model.load(sess, ["serve"], os.fspath(version_dir))

        def run(signature: str, rows: Rows) -> Rows:
            definition = meta.signature_def[signature]
            feed = {definition.inputs[k].name: v for k, v in rows.items()}
            fetch = {k: v.name for k, v in definition.outputs.items()}
            return sess.run(fetch, feed)

        yield run


def check_parity(
    answers: Rows,
    expected: np.ndarray,
    schema: Schema,
    rows: Rows,
    signature: str,
    tolerance: float = TOLERANCE,
) -> float:
    """Compares served predictions with the Keras model's; returns the largest difference.

    A rating is mean + deviation * logit, a probability moves by a quarter of its logit at most, and
    numbers are rounded: a rating's difference counts in units of 4 * deviation + |mean|.

    Raises:
      ExportError: they differ by more than `tolerance`; it names the rows.
    """
    served = np.stack([answers[label] for label in schema.labels], 1)
    moments = label_moments(schema) or [None] * len(schema.labels)
    units = np.array([abs(m[0]) + 4 * m[1] ** 0.5 if m else 1.0 for m in moments])
    difference = (np.abs(served - expected) / units).max(1)
    wrong = np.flatnonzero(~(difference <= tolerance))
    if len(wrong):
        shown = "; ".join(
            f"row {i}: served {served[i].tolist()}, Keras {expected[i].tolist()}, features "
            + str({k: v[i] if v.dtype == object else v[i].tolist() for k, v in rows.items()})
            for i in wrong[:3]
        )
        raise ExportError(
            f"signature `{signature}`: {len(wrong)} of {len(expected)} rows differ from the Keras "
            f"model by more than {tolerance}: {shown}"
        )
    return float(difference.max())


def tensors(rows: Rows) -> dict[str, tf.Tensor]:
    """Columns as tensors."""
    return {name: tf.constant(column) for name, column in rows.items()}


def cast(rows: Rows, specs: Specs) -> Rows:
    """The columns that are inputs, in the inputs' dtypes and widths.

    Raises:
      ExportError: a column that is wider than its input.
    """
    found = {}
    for name, spec in specs.items():
        value = np.asarray(rows[name])
        if spec.dtype != tf.string:
            value = value.astype(spec.dtype.as_numpy_dtype)
        try:
            found[name] = fitted(name, value, spec.shape.as_list())
        except ValueError as error:
            raise ExportError(str(error)) from error
    return found


def fill(
    folder: pathlib.Path,
    name: str,
    model: Ranker,
    functions: Mapping[str, Signature],
    specs: Mapping[str, Specs],
    inputs: Mapping[str, Rows],
    module: tf.Module | None = None,
    own_ops: bool = False,
    origin: Origin = NO_ORIGIN,
) -> None:
    """Makes a version of stock ops, with its warm-up records and its origin.

    Args:
      folder: the version's.
      name: of the model in serving.
      model: what `functions` read.
      functions: signature -> its function.
      specs: signature -> its inputs.
      inputs: signature -> rows for it, the first of which becomes its warm-up record.
      module: holds what else should be saved, such as hash tables.
      own_ops: allows the ops of this package, which a server must have linked in.
      origin: what the version comes from.
    """
    _save(folder, model, functions, specs, module or tf.Module())
    _check_ops(folder, own_ops)
    _write_warmup(folder, name, inputs)
    write_origin(folder / EXTRA, origin)


def replay(
    folder: pathlib.Path,
    model: Ranker,
    signatures: Mapping[str, str],
    inputs: Rows,
    rows: Rows,
    tolerance: float = TOLERANCE,
    calibration: Calibration = NONE,
) -> float:
    """Largest difference between the signatures, given `inputs`, and Keras, given raw `rows`.

    What is compared are calibrated scores, where there is a calibration.
    """
    features = tensors(rows)
    keras = {}
    for head, logits in model(features).items():
        scaled = calibrated(model, calibration.get(head), logits, features)
        keras[head] = predictions(model.schema, tf.cast(scaled, tf.float32)).numpy()
    tolerance *= tolerance_factor(calibration)
    with session(folder) as run:
        return max(
            check_parity(run(name, inputs), keras[head], model.schema, rows, name, tolerance)
            for name, head in signatures.items()
        )


def replay_signatures(
    folder: pathlib.Path,
    schema: Schema,
    names: Sequence[str],
    functions: Mapping[str, Signature],
    inputs: Mapping[str, Rows],
    calibration: Calibration = NONE,
) -> float:
    """Largest difference between signatures that score and the functions they were made of."""
    keras = {name: tf.function(functions[name])(**tensors(inputs[name])) for name in names}
    with session(folder) as run:
        return max(
            check_parity(
                run(name, inputs[name]),
                np.stack([keras[name][label] for label in schema.labels], 1),
                schema,
                inputs[name],
                name,
                TOLERANCE * tolerance_factor(calibration),
            )
            for name in names
        )


def weight_bytes(model: Ranker, *, tables: bool = True) -> int:
    """Bytes of a model's weights, as files hold them."""
    fused = {id(variable) for variable in model.embed.tables.values()}
    weights = [v for v in model.weights if tables or id(v) not in fused]
    return sum(v.shape.num_elements() * v.dtype.size for v in weights)


def _each(functions: Mapping[str, Signature], value: Any) -> dict[str, Any]:
    return dict.fromkeys(functions, value)


def signature_heads(model: Ranker, heads: Sequence[str]) -> dict[str, str]:
    """Signature name -> head. The first head answers `serving_default`."""
    heads = heads or (model.serving_head,)
    unknown = sorted(set(heads) - set(model.head_names))
    if unknown:
        raise ExportError(f"`heads` should be some of {model.head_names}. Received: {list(heads)}")
    return {DEFAULT: heads[0], **{head: head for head in heads}}


@served_in_full
def export_in_graph(
    model: Ranker,
    base_path: str | os.PathLike[str],
    rows: Rows,
    *,
    heads: Sequence[str] = (),
    version: int | None = None,
    calibration: Calibration = NONE,
    origin: Origin = NO_ORIGIN,
) -> tuple[pathlib.Path, float]:
    """Writes the whole model as one SavedModel of stock ops.

    Signatures: `serving_default`, and one with the name of each head. Inputs: the raw features
    (`raw_specs`), lists as wide as the schema's `max_length`. Outputs: for each label its
    probability, or its mean if it is a rating, float32 [B]; `status`, int32 [B]: 0, or bits of
    `BAD_DENSE`, `BAD_LENGTH`, `BAD_SCORE`.

    Args:
      model: the model.
      base_path: folder of the versions.
      rows: real rows, input name -> column, replayed through the session loader before publishing.
      heads: which heads to ship, the default one first; what the others need is left out.
        Default: the model's serving head.
      version: default: one above the highest.
      calibration: head -> scaling of its logits. Default: logits as they are, and no op for it.
      origin: what the version comes from, as JSON can hold it; see `write_origin`.

    Returns:
      The version's folder, and the largest difference to the Keras model on `rows`.

    Raises:
      ExportError: foreign ops, scores that differ, a version that exists. Nothing is left behind.
    """
    signatures = signature_heads(model, heads)
    functions = {name: scorer(model, head, calibration) for name, head in signatures.items()}
    specs = raw_specs(model.schema)
    inputs = cast(rows, specs)
    base = pathlib.Path(base_path)
    with drafting(base, version, needed_bytes=weight_bytes(model)) as draft:
        fill(
            draft.folder,
            base.name,
            model,
            functions,
            _each(functions, specs),
            _each(functions, inputs),
            origin=origin,
        )
        worst = replay(draft.folder, model, signatures, inputs, inputs, calibration=calibration)
    write_serving_files(base)
    return draft.folder, worst


def categorical(model: Ranker, columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that a graph which makes vectors takes: all but the dense features."""
    dense = {d.name for d in model.schema.dense}
    return {name: column for name, column in columns.items() if name not in dense}


def fill_fed(
    folder: pathlib.Path,
    name: str,
    model: Ranker,
    signatures: Mapping[str, str],
    lookup: pathlib.Path,
    inputs: Rows,
    tolerance: float = TOLERANCE,
    calibration: Calibration = NONE,
    origin: Origin = NO_ORIGIN,
) -> float:
    """Makes a version that scores vectors, and replays those that `lookup` makes of `inputs`."""
    with session(lookup) as run:
        vectors = dict(run(DEFAULT, categorical(model, inputs)))
    del vectors[STATUS]
    fed = {**vectors, **{d.name: inputs[d.name] for d in model.schema.dense}}
    if domain := domain_input(model, calibration):
        fed[domain] = inputs[model.schema.domain]
    functions = {key: _fed_scorer(model, head, calibration) for key, head in signatures.items()}
    specs = _each(functions, vector_specs(model, calibration))
    fill(folder, name, model, functions, specs, _each(functions, fed), origin=origin)
    return replay(folder, model, signatures, fed, inputs, tolerance, calibration)


@served_in_full
def export_fed(
    model: Ranker,
    base_path: str | os.PathLike[str],
    rows: Rows,
    *,
    heads: Sequence[str] = (),
    version: int | None = None,
    calibration: Calibration = NONE,
    origin: Origin = NO_ORIGIN,
) -> tuple[pathlib.Path, float]:
    """Writes the graph without its embeddings, which then arrive as inputs.

    `<base_path>/<version>` scores: inputs are a vector for each categorical feature, float32
    [B, dim + first-order columns], lists already pooled, the raw dense features, and the raw domain
    as `<domain>_id` where the graph or the calibration reads it; outputs as for `export_in_graph`.
    `<base_path>_lookup/<version>` makes the vectors: inputs are the raw categorical features,
    outputs the vectors under the same names, and `status`. Both hold stock ops only.

    Args, returns and errors are those of `export_in_graph`.
    """
    signatures = signature_heads(model, heads)
    if not model.schema.categorical:
        raise ExportError("A model without categorical features has no embeddings to cut off.")
    specs = raw_specs(model.schema)
    inputs = cast(rows, specs)
    base = pathlib.Path(base_path)
    with drafting_fed(base, version, weight_bytes(model)) as (graph, lookup):
        lookup_specs, lookup_inputs = categorical(model, specs), categorical(model, inputs)
        fill(
            lookup.folder,
            base.name + LOOKUP,
            model,
            {DEFAULT: _lookup(model)},
            {DEFAULT: lookup_specs},
            {DEFAULT: lookup_inputs},
            origin=origin,
        )
        worst = fill_fed(
            graph.folder,
            base.name,
            model,
            signatures,
            lookup.folder,
            inputs,
            calibration=calibration,
            origin=origin,
        )
    for each in (base, base.with_name(base.name + LOOKUP)):
        write_serving_files(each)
    return graph.folder, worst
