"""SavedModels whose embeddings lie in a store, which the op `Qianmo>EmbeddingLookup` reads.

Graph and embeddings have versions of their own. A graph names the space of the embedding versions
that it was made for (see `qianmo.export.embedding_shards`), so it can ship without embeddings, and
they without a graph.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import tensorflow as tf

from qianmo.export import embedding_shards as shards
from qianmo.export.embedding_changes import write_changes
from qianmo.export.saved_model import (
    TOLERANCE,
    ExportError,
    Rows,
    Signature,
    answer,
    cast,
    fill,
    next_version,
    publishing,
    raw_specs,
    replay,
    signature_heads,
    write_serving_files,
)
from qianmo.layers.encode import Encoded, owns
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
    for start in range(first, end, _CHUNK_ROWS):
        yield variable[start : min(start + _CHUNK_ROWS, end)].numpy()


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
            domain = encoded.ids[model.schema.domain]
            own = owns(model.schema, f.domains, domain)[:, None]
            vectors = tf.where(own, vectors, tf.zeros_like(vectors))
        found[f.name] = tf.cast(vectors, model.embed.compute_dtype)
    return found


def _scorer(model: Ranker, head: str, store: EmbeddingStore, timeout_ms: int) -> Signature:
    def score(**features: tf.Tensor) -> dict[str, tf.Tensor]:
        encoded = model.encode(features)
        vectors = stored_vectors(model, encoded, store, timeout_ms)
        domain = tf.zeros_like(encoded.status, tf.int64)
        if model.schema.domain_feature is not None:
            domain = encoded.ids[model.schema.domain_feature.name]
        embedded = model.embed.assemble(vectors, encoded.dense, domain)
        return answer(model.schema, model.heads(embedded, (head,))[head].logits, encoded.status)

    return score


def export_store(
    model: Ranker,
    base_path: str | os.PathLike[str],
    rows: Rows,
    *,
    heads: Sequence[str] = (),
    version: int | None = None,
    store: str | os.PathLike[str] | None = None,
    embedding_version: int | None = None,
    changes_of: int | None = None,
    dtype: shards.DType = "float32",
    on_mismatch: Literal["fall_back", "refuse"] = "fall_back",
    timeout_ms: int = 0,
    tolerance: float = TOLERANCE,
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
      store: folder of the embedding versions. Default: `<base_path>_embeddings`.
      embedding_version: one that is there and holds the model's embeddings; then only the graph is
        written. Default: the model's tables are written as a new version, which begins a new
        space, and published.
      changes_of: a version there, which the model was trained on from; then only rows that differ
        from it are written, as a new version of its space, so that its graphs read them too.
      dtype: how new tables are stored; changed rows are stored as the others.
      on_mismatch: what the graph does when the store publishes a version of another space, see
        `EmbeddingStore`.
      timeout_ms: when a lookup gives up; 0 for never.
      tolerance: how far scores may be from the Keras model's. Only tables that are not float32 need
        more than the default.

    Returns:
      The graph version's folder, and the largest difference to the Keras model on `rows`.

    Raises:
      ExportError: scores that differ, a version that exists. Then neither graph nor embeddings are
        published.
      StoreError: an embedding version that is not there or is damaged.
    """
    signatures = signature_heads(model, heads)
    if not model.schema.categorical:
        raise ExportError("A model without categorical features has no embeddings to store.")
    if embedding_version is not None and changes_of is not None:
        raise ExportError(
            "Give `embedding_version` to write no embeddings, or `changes_of` to write some. "
            f"Received: {embedding_version} and {changes_of}"
        )
    base = pathlib.Path(base_path)
    folder_of_store = pathlib.Path(store or base.with_name(base.name + "_embeddings"))
    version = version or next_version(base)
    specs = raw_specs(model.schema)
    inputs = cast(rows, specs)
    new = embedding_version is None
    with publishing(base, version) as folder, contextlib.ExitStack() as undo:
        if embedding_version is None:
            embedding_version = next_version(folder_of_store)
            written = (
                shards.write(folder_of_store, embedding_version, tables(model, dtype))
                if changes_of is None
                else write_changes(folder_of_store, embedding_version, changes_of, changes(model))
            )
            undo.callback(shutil.rmtree, written)
        with tempfile.TemporaryDirectory() as view:
            # What is checked is this embedding version, whichever is published now.
            location = _view(pathlib.Path(view), folder_of_store, embedding_version)
            module = tf.Module()
            module.store = EmbeddingStore(
                tf.saved_model.Asset(str(location)),
                space=shards.space(folder_of_store / str(embedding_version)),
                on_mismatch=on_mismatch,
            )
            functions = {
                name: _scorer(model, head, module.store, timeout_ms)
                for name, head in signatures.items()
            }
            fill(
                folder,
                base.name,
                model,
                functions,
                dict.fromkeys(functions, specs),
                dict.fromkeys(functions, inputs),
                module,
                own_ops=True,
            )
            worst = replay(folder, model, signatures, inputs, inputs, tolerance)
            module.store.close()
        assets = folder / "assets"
        path = os.path.relpath(folder_of_store.resolve(), assets.resolve())
        (assets / LOCATION).write_text(f"{path}\n", encoding="utf-8")
        if new:
            # Before the graph: one that refuses other spaces must find its own at load.
            shards.publish(folder_of_store, embedding_version)
        undo.pop_all()
    write_serving_files(base, any(f.is_list for f in model.schema.categorical))
    return base / str(version), worst


def _view(folder: pathlib.Path, store: pathlib.Path, version: int) -> pathlib.Path:
    """Makes a store that shows one version of another; returns the file that names it."""
    (folder / str(version)).symlink_to((store / str(version)).resolve())
    (folder / shards.CURRENT).write_text(f"{version}\n")
    location = folder / LOCATION
    location.write_text(f"{folder}\n")
    return location
