"""CTR models beside DeepCTR's on MovieLens-1M: AUC, speed, and what a larger vocabulary costs."""

from __future__ import annotations

import pathlib
import time
from typing import Any

import common
import numpy as np
import pyarrow.parquet as pq
import tensorflow as tf
import tf_keras

from qianmo.configs import movielens_1m_ctr
from qianmo.layers import metrics
from qianmo.pipelines import readers, statistics
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.train import Run

MODELS = {"deepfm": "DeepFM", "dcn": "DCN", "xdeepfm": "xDeepFM"}
SPEED_TARGET = {"deepfm": 2.0, "dcn": 2.0, "xdeepfm": 1.5}


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


def deepctr_inputs(folder: Any) -> tuple[list[Any], dict[str, Any], dict[str, Any], Any, Any]:
    """The same rows as DeepCTR wants them: every value label-encoded beforehand."""
    from deepctr.feature_column import SparseFeat, VarLenSparseFeat

    parts = [pq.read_table(folder / f"{p}.parquet") for p in ("train", "test")]
    encoded: list[dict[str, Any]] = [{}, {}]
    columns = []
    schema = Recipe.from_config(movielens_1m_ctr.get_config().to_dict()).schema
    for feature in schema.categorical:
        values = [part.column(feature.name).to_pylist() for part in parts]
        if feature.is_list:
            known = {v: i + 1 for i, v in enumerate(sorted({v for x in values[0] for v in x}))}
            for out, rows in zip(encoded, values, strict=True):
                out[feature.name] = np.zeros((len(rows), feature.max_length), np.int64)
                for i, row in enumerate(rows):
                    ids = [known.get(v, 0) for v in row[: feature.max_length]]
                    out[feature.name][i, : len(ids)] = ids
            columns.append(
                VarLenSparseFeat(
                    SparseFeat(feature.name, len(known) + 1, embedding_dim=16),
                    maxlen=feature.max_length,
                    combiner="mean",
                )
            )
        else:
            known = {v: i + 1 for i, v in enumerate(sorted(set(values[0])))}
            for out, rows in zip(encoded, values, strict=True):
                out[feature.name] = np.array([known.get(v, 0) for v in rows])
            columns.append(SparseFeat(feature.name, len(known) + 1, embedding_dim=16))
    labels = [part.column("label").to_numpy().astype(np.float32) for part in parts]
    return columns, encoded[0], encoded[1], labels[0], labels[1]


def peer(name: str, seed: int, data: Any) -> dict[str, float]:
    """DeepCTR's model: test AUC, samples/s of its second epoch, rows/s."""
    from deepctr import models

    columns, train, test, y_train, y_test = data
    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(seed)
    options = {"cin_layer_size": (64, 64)} if name == "xdeepfm" else {}
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


def ours(name: str, seed: int, folder: Any) -> dict[str, float]:
    """Our model by the recipe: test AUC, samples/s of its second epoch, rows/s."""
    config = common.point(movielens_1m_ctr.get_config(name), folder, valid=False)
    config.train.seed = seed
    tf_keras.backend.clear_session()
    with common.model_dir() as temporary:
        run = Run(Recipe.from_config(config.to_dict()), temporary)
        found = run.train()
        path = config.data.test
        parts = [f for f, _ in readers.dataset(run.model.schema, path, batch_size=2**16)]
        inputs = {k: np.concatenate([p[k].numpy() for p in parts]) for k in parts[0]}
        speed = predict_speed(run.model, inputs)
    return {
        "auc": common.test_metrics(found, "model")["auc"],
        "samples/s": found["history"][-1]["samples_per_second"],
        "rows/s": speed,
    }


def half_precision() -> str:
    """Which bfloat16 instructions this machine has."""
    info = pathlib.Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    found = [name for name in ("amx_bf16", "avx512_bf16") if name in flags]
    return ", ".join(found) or "no bfloat16 instructions here"


def step_speed(folder: pathlib.Path, policy: str, steps: int = 12) -> float:
    """Samples/s of xDeepFM's training step alone under a dtype policy."""
    config = common.point(movielens_1m_ctr.get_config("xdeepfm"), folder, valid=False)
    config.train.dtype_policy = policy
    tf_keras.backend.clear_session()
    with common.model_dir() as temporary:
        run = Run(Recipe.from_config(config.to_dict()), temporary)
        data = readers.dataset(run.model.schema, config.data.train, batch_size=2048)
        batches = list(data.take(steps))
        step = tf.function(run.model.train_step)
        step(batches[0])
        start = time.perf_counter()
        for batch in batches:
            loss = step(batch)["loss"]
        loss.numpy()
        seconds = time.perf_counter() - start
    tf_keras.mixed_precision.set_global_policy("float32")
    return 2048 * steps / seconds


def vocabulary_cost(folder: Any, factor: int) -> float:
    """Samples/s of DeepFM's second epoch when every vocabulary is `factor` times as large."""
    config = common.point(movielens_1m_ctr.get_config("deepfm"), folder, valid=False)
    config.data.test = ""
    recipe = Recipe.from_config(config.to_dict())

    schema = statistics.complete(recipe.schema, config.data.train)
    grown = []
    for f in schema.to_config()["features"]:
        if "num_ids" in f:
            f["num_ids"] *= factor
        elif "vocabulary" in f:
            values = list(f["vocabulary"])
            if f.get("dtype") == "string":
                values += [f"unused {i}" for i in range(len(values) * (factor - 1))]
            else:
                values += [-1 - i for i in range(len(values) * (factor - 1))]
            f["vocabulary"] = values
        grown.append(f)
    config.schema = {**schema.to_config(), "features": grown}
    found = common.trained(config)
    return float(found["history"][-1]["samples_per_second"])


def run(*, quick: bool) -> dict[str, Any]:
    """All models, both libraries, seed by seed in turn."""
    folder = common.movielens_1m("time")
    data = deepctr_inputs(folder)
    seeds = [1] if quick else [1, 2, 3]
    names = ["deepfm"] if quick else list(MODELS)
    rows, targets = [], {}
    for name in names:
        found = {"qianmo": [], "deepctr": []}
        for seed in seeds:
            found["qianmo"].append(ours(name, seed, folder))
            found["deepctr"].append(peer(name, seed, data))
            print(name, seed, found["qianmo"][-1], found["deepctr"][-1], flush=True)
        for library, results in found.items():
            rows.append(
                {
                    "model": MODELS[name],
                    "library": library,
                    "AUC": common.shown([r["auc"] for r in results]),
                    "training samples/s": float(np.median([r["samples/s"] for r in results])),
                    "predict rows/s": float(np.median([r["rows/s"] for r in results])),
                }
            )

        def ratio(key: str, found: Any = found) -> float:
            pairs = zip(found["qianmo"], found["deepctr"], strict=True)
            return float(np.median([a[key] / b[key] for a, b in pairs]))

        difference = np.mean([a["auc"] for a in found["qianmo"]]) - np.mean(
            [b["auc"] for b in found["deepctr"]]
        )
        label = MODELS[name]
        targets[f"{label} AUC - DeepCTR's"] = common.target(float(difference), -0.001)
        targets[f"{label} training speed / DeepCTR's"] = common.target(
            ratio("samples/s"), SPEED_TARGET[name]
        )
        targets[f"{label} predict speed / DeepCTR's"] = common.target(ratio("rows/s"), 1.5)
    speeds = {policy: step_speed(folder, policy) for policy in ("float32", "mixed_bfloat16")}
    rows.append(
        {
            "model": "xDeepFM",
            "library": f"qianmo, mixed_bfloat16 ({half_precision()})",
            "training samples/s": speeds["mixed_bfloat16"],
        }
    )
    print(speeds, flush=True)
    pairs = [
        (vocabulary_cost(folder, 1), vocabulary_cost(folder, 10)) for _ in range(1 if quick else 3)
    ]
    targets["DeepFM samples/s with vocabularies 10x as large / as they are"] = common.target(
        float(np.median([b / a for a, b in pairs])), 0.9
    )
    return {"data_sha256": common.sha256(folder), "rows": rows, "targets": targets}
