"""CTR models beside DeepCTR's on MovieLens-1M: AUC, speed, and what a larger vocabulary costs.

Finished seeds are kept in runs/benchmarks/ctr.partial.json, from which a benchmark that was killed
goes on; remove it after a change that the numbers should show.
"""

from __future__ import annotations

import functools
import pathlib
import time
from typing import Any

import common
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tensorflow as tf
import tf_keras
from ml_collections import ConfigDict

from qianmo.configs import movielens_1m_ctr
from qianmo.layers import metrics
from qianmo.layers.mlp import MLP
from qianmo.layers.schema import Schema
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import readers
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training.run import Run

HALF = "mixed_bfloat16"
PARTIAL = common.CACHE / "ctr.partial.json"
MODELS = {"deepfm": "DeepFM", "dcn": "DCN", "xdeepfm": "xDeepFM"}
SPEED_TARGET = {"deepfm": 2.0, "dcn": 2.0, "xdeepfm": 1.5}
# DeepCTR's DCN has a vector for each cross layer unless told; our recipe has matrices.
PEERS: dict[str, dict[str, dict[str, Any]]] = {
    "deepfm": {"DeepCTR": {}},
    "dcn": {"DeepCTR": {}, "DeepCTR, matrices": {"cross_parameterization": "matrix"}},
    "xdeepfm": {"DeepCTR": {"cin_layer_size": (64, 64)}},
}


class Clock(tf_keras.callbacks.Callback):
    """Seconds of each epoch."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self.start)


PREDICT_ROWS = 2**15


def predict_speed(model: Any, inputs: Any) -> float:
    """Rows/s of Keras predict on the first test rows, after a warm-up, best of three."""
    inputs = {name: column[:PREDICT_ROWS] for name, column in inputs.items()}
    model.predict(inputs, batch_size=8192, verbose=0)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model.predict(inputs, batch_size=8192, verbose=0)
        times.append(time.perf_counter() - start)
    return PREDICT_ROWS / min(times)


def label_encoded(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """The prepared rows with every value numbered, as DeepCTR wants them, and their schema.

    Both libraries read these, so that neither pays for strings. 0 is a value unseen in training.
    """
    schema = Recipe.from_config(movielens_1m_ctr.get_config().to_dict()).schema
    parts = {p: pq.read_table(folder / f"{p}.parquet") for p in ("train", "test")}
    columns: dict[str, dict[str, Any]] = {
        part: {name: table.column(name) for name in ("label", "timestamp")}
        for part, table in parts.items()
    }
    features = []
    for feature in schema.categorical:
        train = parts["train"].column(feature.name)
        values = pc.list_flatten(train) if feature.is_list else train
        known = {v: i + 1 for i, v in enumerate(sorted(set(values.to_pylist())))}
        for part, table in parts.items():
            rows = table.column(feature.name).to_pylist()
            columns[part][feature.name] = pa.array(
                [[known.get(v, 0) for v in row] for row in rows]
                if feature.is_list
                else [known.get(v, 0) for v in rows]
            )
        features.append(
            {
                "name": feature.name,
                "dim": feature.dim,
                "num_ids": len(known) + 1,
                "max_length": feature.max_length,
                "keep": feature.keep,
            }
        )
    encoded = folder.with_name(folder.name + "_label_encoded")
    encoded.mkdir(exist_ok=True)
    for part, found in columns.items():
        pq.write_table(pa.table(found), encoded / f"{part}.parquet", row_group_size=2**16)
    return encoded, {"features": features, "labels": ["label"], "task_id": "user_id"}


def deepctr_inputs(folder: pathlib.Path, schema: dict[str, Any]) -> Any:
    """Feature columns, and (inputs, labels) of the training and the test rows, for DeepCTR."""
    from deepctr.feature_column import SparseFeat, VarLenSparseFeat

    columns = []
    for f in schema["features"]:
        sparse = SparseFeat(f["name"], f["num_ids"], embedding_dim=f["dim"])
        if f["max_length"]:
            sparse = VarLenSparseFeat(sparse, maxlen=f["max_length"], combiner="mean")
        columns.append(sparse)
    made = []
    for part in ("train", "test"):
        path = str(folder / f"{part}.parquet")
        blocks = list(readers.blocks(Schema.from_config(schema), path))
        whole = {k: np.concatenate([b[k] for b in blocks]) for k in blocks[0]}
        made.append(({f["name"]: whole[f["name"]] for f in schema["features"]}, whole["label"]))
    return columns, *made


def peer(name: str, seed: int, data: Any, options: dict[str, Any]) -> dict[str, float]:
    """DeepCTR's model: test AUC, samples/s of its second epoch, rows/s."""
    from deepctr import models

    columns, (train, y_train), (test, y_test) = data
    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(seed)
    model = getattr(models, MODELS[name])(
        columns, columns, dnn_hidden_units=movielens_1m_ctr.UNITS, task="binary", **options
    )
    model.compile("adam", "binary_crossentropy")
    clock = Clock()
    model.fit(train, y_train, batch_size=2048, epochs=2, verbose=0, callbacks=[clock])
    scores = model.predict(test, batch_size=8192, verbose=0)[:, 0]
    return {
        "auc": metrics.auc(y_test, scores),
        "samples/s": len(y_train) / clock.seconds[-1],
        "rows/s": predict_speed(model, test),
    }


def recipe(name: str, seed: int, folder: pathlib.Path, schema: dict[str, Any]) -> ConfigDict:
    """The recipe of a model on the label-encoded rows."""
    config = common.point(movielens_1m_ctr.get_config(name), folder, valid=False)
    config.schema = schema
    config.train.seed = seed
    return config


def samples_per_second(found: dict[str, Any]) -> float:
    """Of the second epoch, with the reading and shuffling before its first step."""
    return float(found["rows"]["train"] / found["history"][-1]["seconds"])


def ours(
    name: str, seed: int, folder: pathlib.Path, schema: dict[str, Any], policy: str = "float32"
) -> dict[str, float]:
    """Our model by the recipe: test AUC, samples/s of its second epoch, rows/s."""
    config = recipe(name, seed, folder, schema)
    config.train.dtype_policy = policy
    tf_keras.backend.clear_session()
    with common.model_dir() as temporary:
        run = Run(Recipe.from_config(config.to_dict()), temporary)
        found = run.train()
        path = config.data.test
        parts = [f for f, _ in readers.dataset(run.model.schema, path, batch_size=2**16)]
        inputs = {k: np.concatenate([p[k].numpy() for p in parts]) for k in parts[0]}
        speed = predict_speed(run.model, inputs)
    tf_keras.mixed_precision.set_global_policy("float32")
    return {
        "auc": common.test_metrics(found, "model")["auc"],
        "samples/s": samples_per_second(found),
        "rows/s": speed,
    }


def half_precision() -> str:
    """Which bfloat16 instructions this machine has."""
    info = pathlib.Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    found = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    return ", ".join(found) or "no bfloat16 instructions here"


def products_alone(width: int = 144) -> dict[str, float]:
    """What the MLP's matrix products alone allow: the ceiling of every model that has it."""
    network = MLP(movielens_1m_ctr.UNITS, seed=1)

    @tf.function
    def step(x: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(network(x))
        return tape.gradient(loss, [x, *network.trainable_variables])

    def speed(function: Any, rows: int) -> float:
        x = tf.random.normal([rows, width])
        times = []
        for _ in range(60):
            start = time.perf_counter()
            tf.nest.flatten(function(x))[0].numpy()
            times.append(time.perf_counter() - start)
        return rows / float(np.median(times))

    network.build([None, width])
    return {"training": speed(step, 2048), "predict": speed(tf.function(network), 8192)}


def vocabulary_cost(folder: pathlib.Path, schema: dict[str, Any], factor: int) -> float:
    """Samples/s of DeepFM's second epoch when every vocabulary is `factor` times as large."""
    features = [{**f, "num_ids": f["num_ids"] * factor} for f in schema["features"]]
    config = recipe("deepfm", 1, folder, {**schema, "features": features})
    config.data.test = ""
    return samples_per_second(common.trained(config))


def compared(
    name: str, library: str, own: list[dict[str, float]], peers: list[dict[str, float]]
) -> dict[str, Any]:
    """The targets of a model against one peer; speeds are compared seed by seed."""

    def ratio(key: str) -> float:
        return float(np.median([a[key] / b[key] for a, b in zip(own, peers, strict=True)]))

    difference = float(np.mean([a["auc"] for a in own]) - np.mean([b["auc"] for b in peers]))
    model = MODELS[name]
    return {
        f"{model}: AUC - {library}'s": common.target(difference, -0.001),
        f"{model}: training speed / {library}'s": common.target(
            ratio("samples/s"), SPEED_TARGET[name]
        ),
        f"{model}: predict speed / {library}'s": common.target(ratio("rows/s"), 1.5),
    }


def all_units(
    encoded: pathlib.Path, schema: dict[str, Any], names: list[str], seeds: list[int], *, keep: bool
) -> dict[str, dict[str, dict[str, float]]]:
    """Results of the libraries, which take turns: `model seed` -> library -> result."""
    data = deepctr_inputs(encoded, schema)
    done: dict[str, Any] = run_dir.read_json(PARTIAL, {}) if keep else {}
    for name in names:
        for seed in seeds:
            found = done.setdefault(f"{name} {seed}", {})
            calls = {"qianmo": functools.partial(ours, name, seed, encoded, schema)}
            if name == "xdeepfm" and seed == 1:  # minutes an epoch without instructions for it
                calls[HALF] = functools.partial(ours, name, seed, encoded, schema, HALF)
            for library, options in PEERS[name].items():
                calls[library] = functools.partial(peer, name, seed, data, options)
            for library in [c for c in calls if c not in found]:
                found[library] = calls[library]()
                print(name, seed, library, found[library], flush=True)
                if keep:
                    run_dir.write_json(PARTIAL, done)
    return done


def run(*, quick: bool) -> dict[str, Any]:
    """All models, both libraries, seed by seed in turn."""
    folder = common.movielens_1m("time")
    encoded, schema = label_encoded(folder)
    seeds = [1] if quick else [1, 2, 3]
    names = ["deepfm"] if quick else list(MODELS)
    done = all_units(encoded, schema, names, seeds, keep=not quick)
    rows: list[dict[str, Any]] = []
    targets: dict[str, Any] = {}
    for name in names:
        units = [done[f"{name} {seed}"] for seed in seeds]
        found = {library: [u[library] for u in units if library in u] for library in units[0]}
        for library, results in found.items():
            rows.append(
                {
                    "model": MODELS[name],
                    "library": f"qianmo, {HALF} ({half_precision()})"
                    if library == HALF
                    else library,
                    "AUC": common.shown([r["auc"] for r in results]),
                    "training samples/s": float(np.median([r["samples/s"] for r in results])),
                    "predict rows/s": float(np.median([r["rows/s"] for r in results])),
                }
            )
        for library in PEERS[name]:
            targets.update(compared(name, library, found["qianmo"], found[library]))
    ceiling = products_alone()
    rows.append(
        {
            "model": "MLP 256-128-64 alone",
            "library": "its matrix products: no data, no tables, no optimiser",
            "training samples/s": ceiling["training"],
            "predict rows/s": ceiling["predict"],
        }
    )
    pairs = [
        (vocabulary_cost(encoded, schema, 1), vocabulary_cost(encoded, schema, 10))
        for _ in range(1 if quick else 3)
    ]
    targets["DeepFM samples/s with vocabularies 10x as large / as they are"] = common.target(
        float(np.median([b / a for a, b in pairs])), 0.9
    )
    return {"data_sha256": common.sha256(encoded), "rows": rows, "targets": targets}
