"""SavedModels whose embeddings lie in a store, which the op `Qianmo>EmbeddingLookup` reads.

Graph and embeddings have versions of their own. A graph names the space of the embedding versions
that it was made for (see `qianmo.export.embedding_shards`), so it can ship without embeddings, and
they without a graph.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypedDict, Unpack

import numpy as np
import tensorflow as tf

from qianmo.export import embedding_shards as shards
from qianmo.export.calibration import NONE, Calibration, calibrated
from qianmo.export.embedding_changes import fill_changes
from qianmo.export.precision import served_in_full
from qianmo.export.publishing import (
    LOOKUP,
    NO_ORIGIN,
    Draft,
    Origin,
    drafting,
    drafting_fed,
    write_origin,
    write_serving_files,
)
from qianmo.export.redis_loader import holds, load
from qianmo.export.saved_model import (
    DEFAULT,
    STATUS,
    TOLERANCE,
    ExportError,
    Rows,
    Signature,
    answer,
    cast,
    categorical,
    fill,
    fill_fed,
    raw_specs,
    replay,
    signature_heads,
    weight_bytes,
)
from qianmo.layers.encode import Encoded, completed, owns
from qianmo.models.ranker import Ranker
from qianmo.ops.embedding_lookup import EmbeddingStore, Read

LOCATION = "embedding_store"
_CHUNK_ROWS = 1 << 16


def tables(
    model: Ranker, dtype: shards.DType = "float32"
) -> Iterator[tuple[shards.Table, Iterator[np.ndarray]]]:
    """The model's tables with their rows, as `embedding_shards.write` takes them."""
    for name in model.schema.tables:
        variable, first, end = model.embed.rows(name)
        table = shards.Table(name=name, dim=variable.shape[1], num_rows=end - first, dtype=dtype)
        yield table, _chunks(variable, first, end)


def changes(model: Ranker) -> Iterator[tuple[str, Iterator[shards.IdRows]]]:
    """The model's tables, as `embedding_changes.write_changes` takes them."""
    for table, chunks in tables(model):
        yield table.name, _with_ids(chunks)


def _with_ids(chunks: Iterator[np.ndarray]) -> Iterator[shards.IdRows]:
    first = 0
    for rows in chunks:
        yield np.arange(first, first + len(rows)), rows
        first += len(rows)


def _chunks(variable: tf.Variable, first: int, end: int) -> Iterator[np.ndarray]:
    # A slice would copy the whole table once sparse steps have been taken on it.
    for start in range(first, end, _CHUNK_ROWS):
        yield tf.gather(variable, tf.range(start, min(start + _CHUNK_ROWS, end))).numpy()


def stored_vectors(
    model: Ranker, encoded: Encoded, store: EmbeddingStore, timeout_ms: int = 0
) -> dict[str, tf.Tensor]:
    """`Embed.vectors` from a store, in one round and of one version."""
    features = model.schema.categorical
    reads = [
        Read(
            f.table,
            f.dim + model.embed.linear_dim,
            encoded.ids[f.name],
            *((encoded.lengths[f.name], f.pooling) if f.is_list else ()),
        )
        for f in features
    ]
    found = {}
    for f, vectors in zip(features, store.lookup(reads, timeout_ms=timeout_ms), strict=True):
        if f.domains:
            own = owns(model.schema, f.domains, encoded.domain(model.schema))[:, None]
            vectors = tf.where(own, vectors, tf.zeros_like(vectors))
        found[f.name] = tf.cast(vectors, model.embed.compute_dtype)
    return found


def _scorer(
    model: Ranker, head: str, store: EmbeddingStore, timeout_ms: int, calibration: Calibration
) -> Signature:
    def score(**features: tf.Tensor) -> dict[str, tf.Tensor]:
        encoded = model.encode(features)
        vectors = stored_vectors(model, encoded, store, timeout_ms)
        domain = encoded.domain(model.schema)
        embedded = model.embed.assemble(vectors, encoded.dense, domain)
        logits = model.heads(embedded, (head,))[head].logits
        logits = calibrated(model, calibration.get(head), logits, features)
        return answer(model.schema, logits, encoded.status)

    return score


def _store_lookup(model: Ranker, store: EmbeddingStore, timeout_ms: int) -> Signature:
    def lookup(**features: tf.Tensor) -> dict[str, tf.Tensor]:
        encoded = model.encode(completed(model.schema, features))
        return {**stored_vectors(model, encoded, store, timeout_ms), STATUS: encoded.status}

    return lookup


class Embeddings(TypedDict, total=False):
    """Where a graph's embeddings are and how they come there, see `export_store`."""

    store: str | os.PathLike[str] | None
    embedding_version: int | None
    changes_of: int | None
    dtype: shards.DType
    on_mismatch: Literal["fall_back", "refuse"]
    redis: str


@contextlib.contextmanager
def _embeddings(
    model: Ranker,
    base: pathlib.Path,
    origin: Origin,
    store: str | os.PathLike[str] | None = None,
    embedding_version: int | None = None,
    changes_of: int | None = None,
    dtype: shards.DType = "float32",
    on_mismatch: Literal["fall_back", "refuse"] = "fall_back",
    redis: str = "",
) -> Iterator[tuple[EmbeddingStore, Callable[[pathlib.Path], None]]]:
    """Writes the model's embeddings if they are not there; publishes them when all went well.

    Yields:
      Their store, as a graph reads it while it is checked, and a function that has a graph version
      look for it where it will be.
    """
    if not model.schema.categorical:
        raise ExportError("A model without categorical features has no embeddings to store.")
    if embedding_version is not None and changes_of is not None:
        raise ExportError(
            "Give `embedding_version` to write no embeddings, or `changes_of` to write some. "
            f"Received: {embedding_version} and {changes_of}"
        )
    folder = pathlib.Path(store or base.with_name(base.name + "_embeddings"))

    def point(graph: pathlib.Path) -> None:
        assets = graph / "assets"
        where = redis or os.path.relpath(folder.resolve(), assets.resolve())
        (assets / LOCATION).write_text(f"{where}\n", encoding="utf-8")

    with contextlib.ExitStack() as stack:
        if embedding_version is not None:
            draft, path = None, folder / str(embedding_version)
        else:
            draft = stack.enter_context(_written(model, folder, changes_of, dtype, origin))
            embedding_version, path = draft.version, draft.folder
        with tempfile.TemporaryDirectory() as temporary:
            # What is checked is this embedding version, whichever is published now.
            view = pathlib.Path(temporary)
            location = _view(view, path, embedding_version)
            opened = EmbeddingStore(
                tf.saved_model.Asset(str(location)),
                space=shards.space(path),
                on_mismatch=on_mismatch,
            )
            with contextlib.closing(opened):  # before its folder goes
                yield opened, point
            # Before the graph: one that refuses other spaces must find its own at load.
            if redis and (draft or not holds(redis, view, embedding_version)):
                load(view, embedding_version, redis, publish=draft is not None)
        if draft is not None:
            shards.verify(draft.folder)
            draft.commit()
            shards.set_current(folder, draft.version)


@contextlib.contextmanager
def _written(
    model: Ranker,
    folder: pathlib.Path,
    changes_of: int | None,
    dtype: shards.DType,
    origin: Origin,
) -> Iterator[Draft]:
    """The model's embeddings as a new version that is not yet published."""
    described = [table for table, _ in tables(model, dtype)]
    with drafting(
        folder,
        needed_bytes=sum(table.num_rows * shards.row_bytes(table) for table in described),
        is_published=lambda version: shards.published(folder) == version,
        of_models=False,
    ) as draft:
        if changes_of is None:
            shards.fill(draft.folder, draft.version, tables(model, dtype), space=draft.version)
        else:
            source = folder / str(changes_of)
            fill_changes(draft.folder, draft.version, source, changes(model))
        write_origin(draft.folder, origin)
        yield draft


def _holding(store: EmbeddingStore) -> tf.Module:
    module = tf.Module()
    module.store = store
    return module


@served_in_full
def export_store(
    model: Ranker,
    base_path: str | os.PathLike[str],
    rows: Rows,
    *,
    heads: Sequence[str] = (),
    version: int | None = None,
    timeout_ms: int = 0,
    tolerance: float = TOLERANCE,
    calibration: Calibration = NONE,
    origin: Origin = NO_ORIGIN,
    **embeddings: Unpack[Embeddings],
) -> tuple[pathlib.Path, float]:
    """Writes the graph, and its embeddings into a store if they are not there.

    Signatures, inputs and outputs are those of `export_in_graph`. The graph holds no table and
    needs the op: a server without it refuses the model at load. Where the store lies says the file
    `assets/embedding_store` in the version's folder, from that file's folder on, so that both can
    move; it may be edited.

    Args:
      model: the model.
      base_path: folder of the graph's versions.
      rows: real rows, input name -> column, replayed through the session loader before publishing.
      heads: which heads to ship, the default one first. Default: the model's serving head.
      version: of the graph. Default: one above the highest.
      timeout_ms: when a lookup gives up; 0 for never.
      tolerance: how far scores may be from the Keras model's. Only tables that are not float32 need
        more than the default.
      calibration: head -> scaling of its logits, see `export_in_graph`.
      origin: what the graph and embeddings that are written come from, see `write_origin`.
      store: folder of the embedding versions. Default: `<base_path>_embeddings`.
      embedding_version: one that is there and holds the model's embeddings; then only the graph is
        written. Default: the model's tables are written as a new version, which begins a new
        space, and published.
      changes_of: a version there, which the model was trained on from; then only rows that differ
        from it are written, as a new version of its space, so that its graphs read them too.
      dtype: how new tables are stored; changed rows are stored as the others.
      on_mismatch: what the graph does when the store publishes a version of another space, see
        `EmbeddingStore`.
      redis: URL of a Redis; then the embeddings are loaded from the folder into it as well
        (`redis_loader.load`), and it is there that the graph reads them.

    Returns:
      The graph version's folder, and the largest difference to the Keras model on `rows`.

    Raises:
      ExportError: scores that differ, a version that exists. Then neither graph nor embeddings are
        published.
      StoreError: an embedding version that is not there or is damaged; a Redis that refuses.
    """
    signatures = signature_heads(model, heads)
    base = pathlib.Path(base_path)
    specs = raw_specs(model.schema)
    inputs = cast(rows, specs)
    with (
        drafting(base, version, needed_bytes=weight_bytes(model, tables=False)) as draft,
        _embeddings(model, base, origin, **embeddings) as (opened, point),
    ):
        functions = {
            name: _scorer(model, head, opened, timeout_ms, calibration)
            for name, head in signatures.items()
        }
        fill(
            draft.folder,
            base.name,
            model,
            functions,
            dict.fromkeys(functions, specs),
            dict.fromkeys(functions, inputs),
            _holding(opened),
            own_ops=True,
            origin=origin,
        )
        worst = replay(draft.folder, model, signatures, inputs, inputs, tolerance, calibration)
        point(draft.folder)
    write_serving_files(base)
    return draft.folder, worst


@served_in_full
def export_fed_store(
    model: Ranker,
    base_path: str | os.PathLike[str],
    rows: Rows,
    *,
    heads: Sequence[str] = (),
    version: int | None = None,
    timeout_ms: int = 0,
    tolerance: float = TOLERANCE,
    calibration: Calibration = NONE,
    origin: Origin = NO_ORIGIN,
    **embeddings: Unpack[Embeddings],
) -> tuple[pathlib.Path, float]:
    """`export_fed` whose vectors lie in an embedding store.

    `<base_path>/<version>` is the same: stock ops, and vectors as inputs. But
    `<base_path>_lookup/<version>` holds no table and reads the store by the op. It is for clients
    that run it themselves (`pipelines.serving.fed_client.FedClient`), or for a server with the op.

    Args, returns and errors are those of `export_store`.
    """
    signatures = signature_heads(model, heads)
    base = pathlib.Path(base_path)
    specs = raw_specs(model.schema)
    inputs = cast(rows, specs)
    with (
        drafting_fed(base, version, weight_bytes(model, tables=False)) as (graph, lookup),
        _embeddings(model, base, origin, **embeddings) as (opened, point),
    ):
        fill(
            lookup.folder,
            base.name + LOOKUP,
            model,
            {DEFAULT: _store_lookup(model, opened, timeout_ms)},
            {DEFAULT: categorical(model, specs)},
            {DEFAULT: categorical(model, inputs)},
            _holding(opened),
            own_ops=True,
            origin=origin,
        )
        worst = fill_fed(
            graph.folder,
            base.name,
            model,
            signatures,
            lookup.folder,
            inputs,
            tolerance,
            calibration,
            origin,
        )
        point(lookup.folder)
    for each in (base, base.with_name(base.name + LOOKUP)):
        write_serving_files(each)
    return graph.folder, worst


def _view(folder: pathlib.Path, version_dir: pathlib.Path, version: int) -> pathlib.Path:
    """Makes a store that shows one version of another; returns the file that names it."""
    (folder / str(version)).symlink_to(version_dir.resolve())
    (folder / shards.CURRENT).write_text(f"{version}\n")
    location = folder / LOCATION
    location.write_text(f"{folder}\n")
    return location
