"""KuaiRand's five largest tabs in one model, by many designs, against one model for each tab.

Splits: k5 trains to 29 April and tests on 1 to 5 May; kf has five folds by user, so that every test
user is new; rolling trains anew for each of these five days, on all days but the one before, which
validates. Every design has the same features, and trains until its mean AUC over tabs and labels
falls on validation rows (in k5 of 30 April, in kf of a tenth of the other users). The wider plain
model is the capacity control. Differences are paired by seed (k5), fold or day, and their standard
errors come from a bootstrap that draws each test user once for all folds or days. AUCs are of one
tab and label each, never pooled over tabs or days. Finished runs are kept under runs/benchmarks,
from where a benchmark that was killed goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import common
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tensorflow as tf
import tf_keras
from ml_collections import ConfigDict

from qianmo.configs import kuairand_domains as recipes
from qianmo.layers import metrics
from qianmo.layers.features import Schema
from qianmo.layers.partitioned_norm import PartitionedNorm
from qianmo.models.ranker import Ranker
from qianmo.pipelines import readers, run_dir, runtime, statistics
from qianmo.pipelines.recipe import Recipe, optimizer

TABS = recipes.TABS
SMALL = TABS[1:]
LABELS = ("is_click", "long_view")
WORK = common.CACHE / "domains_kuairand"
PARTIAL = common.CACHE / "domains_kuairand.partial.json"

SINGLE = "one model per tab"
DOMAIN_ID, WIDER = "one model, tab as a feature", "the same, wider (capacity control)"
ASSEMBLY = "shared + own experts, gate, star tower"
DESIGNS = {
    SINGLE: "single",
    "one model, tab unknown to it": "no_domain_id",
    DOMAIN_ID: "domain_id",
    WIDER: "wider",
    "shared-bottom": "shared_bottom",
    "MMoE": "mmoe",
    "PLE": "ple",
    "STAR": "star",
    "STAR, partitioned norm": "star_norm",
    "STAR, auxiliary network": "star_auxiliary",
    "shared + own experts, gate, plain tower": "cross_domain_plain_tower",
    ASSEMBLY: "cross_domain",
    "PPNet": "ppnet",
    "EPNet": "epnet",
    "PEPNet": "pepnet",
}
SPLITS = {
    "k5": ("k5",),
    "kf": tuple(f"kf{fold}" for fold in range(5)),
    "rolling": tuple(f"rolling{day}" for day in range(1, 6)),
}
SEEDS = {"k5": (1, 2, 3, 4, 5), "kf": (1,), "rolling": (1,)}
FEWER_DESIGNS = (SINGLE, DOMAIN_ID, WIDER, "MMoE", "PLE", "STAR", ASSEMBLY)  # but for k5
MOST_PASSES = 6
RESAMPLES = 200

Floats = Any


def prepare() -> None:
    """Writes the splits' rows, of the five tabs, once."""
    if (WORK / SPLITS["rolling"][-1] / "test.parquet").exists():
        return
    folder = common.kuairand()
    rows = pa.concat_tables(
        [pq.read_table(folder / f"{part}.parquet") for part in ("train", "valid", "test")]
    )
    rows = rows.filter(pc.is_in(rows["tab"], pa.array(TABS, rows["tab"].type)))
    date, user = rows["date"].to_numpy(), rows["user_id"].to_numpy()
    users, code = np.unique(user, return_inverse=True)
    random = np.random.default_rng(0)
    fold = random.integers(0, 5, len(users))[code]
    is_valid = random.random(len(users))[code] < 0.1
    parts = {"k5": (date <= 20220429, date == 20220430, date >= 20220501)}
    for i in range(5):
        parts[f"kf{i}"] = ((fold != i) & ~is_valid, (fold != i) & is_valid, fold == i)
    days = np.unique(date)
    for split, before, day in zip(SPLITS["rolling"], days[-6:-1], days[-5:], strict=True):
        parts[split] = (date < before, date == before, date == day)
    for split, chosen in parts.items():
        (WORK / split).mkdir(parents=True, exist_ok=True)
        for name, which in zip(("train", "valid", "test"), chosen, strict=True):
            pq.write_table(rows.filter(pa.array(which)), WORK / split / f"{name}.parquet")


class Rows(NamedTuple):
    """A split in memory: the schema with its vocabularies, and each part's (features, targets)."""

    schema: Schema
    train: tuple[Any, Any]
    valid: tuple[Any, Any]
    test: tuple[Any, Any]


@functools.lru_cache(maxsize=2)
def read(split: str, described: str) -> Rows:
    """Reads a split as a schema, given as JSON, describes it."""
    schema = Schema.from_config(json.loads(described))
    schema = statistics.complete(schema, WORK / split / "train.parquet")
    parts = []
    for name in ("train", "valid", "test"):
        blocks = [*readers.blocks(schema, WORK / split / f"{name}.parquet")]
        block = {column: np.concatenate([b[column] for b in blocks]) for column in blocks[0]}
        parts.append(tf.nest.map_structure(tf.constant, readers.batch(schema, block)))
    return Rows(schema, *parts)


def scores(model: Ranker, features: Mapping[str, tf.Tensor]) -> Floats:
    """Probabilities, [N, K]."""
    count = len(next(iter(features.values())))
    parts = []
    for start in range(0, count, 8192):
        chosen = tf.range(start, start + 8192) % count  # one shape, so that it is traced once
        batch = {name: tf.gather(x, chosen) for name, x in features.items()}
        parts.append(model.probabilities(batch)[model.serving_head].numpy())
    return np.concatenate(parts)[:count]


def mean_auc(targets: Mapping[str, tf.Tensor], found: Floats) -> float:
    """Mean of the AUCs of every tab and label that it has."""
    labels, tabs = targets["labels"].numpy(), targets["domain"].numpy()
    return float(
        np.mean(
            [
                metrics.auc(labels[tabs == tab, k], found[tabs == tab, k])
                for tab in np.unique(tabs)
                for k in range(labels.shape[1])
                if not np.isnan(labels[tabs == tab, k]).any()
            ]
        )
    )


class Trainer:
    """A recipe on a split, traced once and trained from any seed's first weights."""

    def __init__(self, config: ConfigDict, split: str) -> None:
        tf_keras.backend.clear_session()
        self.recipe = Recipe.from_config(config.to_dict())
        described = json.dumps(self.recipe.schema.to_config(), sort_keys=True)
        self.rows = read(split, described)
        self.model = self._built(self.recipe.train.seed)
        train = self.recipe.train
        self.optimizers = (
            optimizer(train.optimizer, "train.optimizer"),
            optimizer(train.table_optimizer, "train.table_optimizer"),
        )
        self.model.compile(*self.optimizers)

    def _built(self, seed: int) -> Ranker:
        train = dataclasses.replace(self.recipe.train, seed=seed)
        return run_dir.build(dataclasses.replace(self.recipe, schema=self.rows.schema, train=train))

    def parameters(self) -> int:
        """Number of weights that are no embeddings."""
        tables = {v.ref() for v in self.model.embed.variables}
        return int(
            sum(np.prod(v.shape) for v in self.model.trainable_variables if v.ref() not in tables)
        )

    def __call__(self, seed: int) -> tuple[Floats, int, float]:
        """Test scores after the pass that is best on validation rows, its number, seconds each."""
        model = self.model
        # Dropout goes on counting, so that its masks are new ones, too.
        fresh = self._built(seed).trainable_variables
        for variable, first in zip(model.trainable_variables, fresh, strict=True):
            variable.assign(first)
        for norm in (layer for layer in model.submodules if isinstance(layer, PartitionedNorm)):
            norm.rows.assign(tf.zeros_like(norm.rows))
        for each in self.optimizers:
            for variable in each.variables:
                if "learning_rate" not in variable.name:
                    variable.assign(tf.zeros_like(variable))
        count = len(self.rows.train[1]["labels"])
        size = min(self.recipe.train.batch_size, count)
        best, found, passes, seconds = -np.inf, np.zeros(0), 0, []
        for number in range(MOST_PASSES):
            order = np.random.default_rng([seed, number]).permutation(count)
            order = order[: count // size * size]
            batches = tf.nest.map_structure(
                lambda x, order=order: tf.reshape(tf.gather(x, order), [-1, size, *x.shape[1:]]),
                self.rows.train,
            )
            start = time.perf_counter()
            model.fit(tf.data.Dataset.from_tensor_slices(batches), verbose=0)
            seconds.append(time.perf_counter() - start)
            value = mean_auc(self.rows.valid[1], scores(model, self.rows.valid[0]))
            if value <= best:
                break
            best, found, passes = value, scores(model, self.rows.test[0]), number + 1
        return found, passes, float(np.min(seconds))


class Runs:
    """Units of work, a design on a split with a seed, each done once."""

    def __init__(self, *, keep: bool = True) -> None:
        runtime.settle()
        prepare()
        self.keep = keep
        self.done = run_dir.read_json(PARTIAL, {}) if keep else {}
        self.folder = WORK / "scores"
        self.folder.mkdir(exist_ok=True)
        self.tests: dict[str, dict[str, Any]] = {}

    def test(self, split: str) -> dict[str, Any]:
        """Tabs, users and labels of the test rows."""
        if split not in self.tests:
            table = pq.read_table(
                WORK / split / "test.parquet", columns=["tab", "user_id", *LABELS]
            )
            self.tests[split] = {name: table[name].to_numpy() for name in table.column_names}
        return self.tests[split]

    def __call__(self, variant: str, split: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """For each seed the scores of all test rows, [N, 2], and what the training took."""
        names = [f"single_{tab}" for tab in TABS] if variant == "single" else [variant]
        described = [recipes.get_config(name).to_json() for name in names]
        keys = {}
        for seed in seeds:
            said = json.dumps([described, split, seed, MOST_PASSES])
            keys[seed] = (
                f"{variant}_{split}_{seed}_{hashlib.sha256(said.encode()).hexdigest()[:12]}"
            )
        missing = [s for s, key in keys.items() if key not in self.done]
        if missing:
            start = time.perf_counter()
            tabs = self.test(split)["tab"]
            found = {seed: np.zeros((len(tabs), len(LABELS)), np.float32) for seed in missing}
            told: dict[int, dict[str, Any]] = {
                seed: {"parameters": 0, "passes": [], "seconds of a pass": 0.0} for seed in missing
            }
            for name in names:
                trainer = Trainer(recipes.get_config(name), split)
                rows = tabs == int(name[7:]) if variant == "single" else slice(None)
                for seed in missing:
                    found[seed][rows], passes, seconds = trainer(seed)
                    told[seed]["parameters"] += trainer.parameters()
                    told[seed]["passes"].append(passes)
                    told[seed]["seconds of a pass"] += seconds
            for seed in missing:
                np.save(self.folder / f"{keys[seed]}.npy", found[seed])
                self.done[keys[seed]] = told[seed]
            spent = time.perf_counter() - start
            print(f"{variant} {split} {missing}: {told}, {spent:.0f} s", flush=True)
            if self.keep:
                run_dir.write_json(PARTIAL, self.done)
        return [
            {**self.done[key], "scores": np.load(self.folder / f"{key}.npy")}
            for key in keys.values()
        ]


def resampled_aucs(labels: Floats, found: Floats, weights: Floats) -> Floats:
    """AUC under each set of row weights: [N], [N], [R, N] -> [R]. Ties count half."""
    order = np.argsort(found)
    labels, found = labels[order].astype(np.float32), found[order]
    weights = weights[:, order]
    ties = np.flatnonzero(np.r_[True, found[1:] != found[:-1]])
    positive = np.add.reduceat(weights * labels, ties, axis=1).astype(np.float64)
    negative = np.add.reduceat(weights * (1 - labels), ties, axis=1).astype(np.float64)
    below = np.cumsum(negative, 1) - negative / 2
    pairs = positive.sum(1) * negative.sum(1)
    return (positive * below).sum(1) / np.where(pairs > 0, pairs, np.nan)


def draws(users: Floats) -> Floats:
    """How often each user counts, [1 + resample, U]: once, and then as drawn with replacement."""
    shares = np.full(len(users), 1 / len(users))
    drawn = np.random.default_rng(1).multinomial(len(users), shares, RESAMPLES)
    return np.concatenate([np.ones((1, len(users))), drawn]).astype(np.float32)


def tab_aucs(runs: Runs, design: str, split: str, seeds: Sequence[int]) -> tuple[Floats, Floats]:
    """AUCs [label, tab, 1 + resample], the first of the rows as they are, and tab 1's GAUC [label].

    Both are means over the split's parts and the seeds.
    """
    tests = [runs.test(part) for part in SPLITS[split]]
    users = np.unique(np.concatenate([test["user_id"] for test in tests]))
    drawn = draws(users)
    aucs = np.zeros((len(LABELS), len(TABS), RESAMPLES + 1))
    gaucs = np.zeros(len(LABELS))
    for part, test in zip(SPLITS[split], tests, strict=True):
        code = np.searchsorted(users, test["user_id"])
        for one in runs(DESIGNS[design], part, seeds):
            for t, tab in enumerate(TABS):
                rows = test["tab"] == tab
                weights = drawn[:, code[rows]]
                for k, label in enumerate(LABELS):
                    y, p = test[label][rows], one["scores"][rows, k]
                    aucs[k, t] += resampled_aucs(y, p, weights)
                    if tab == TABS[0]:
                        gaucs[k] += metrics.gauc(y, p, code[rows])
    count = len(tests) * len(seeds)
    return aucs / count, gaucs / count


def difference(one: Floats, other: Floats) -> tuple[float, float]:
    """A difference, and its standard error over the resamples."""
    gain = one - other
    return float(gain[0]), float(np.nanstd(gain[1:], ddof=1))


def thousandths(one: Floats, other: Floats) -> str:
    """A difference in thousandths as text, with its standard error."""
    value, error = difference(one, other)
    return f"{1000 * value:+.1f} ({1000 * error:.1f})"


def by_tab(one: Floats, other: Floats) -> dict[str, str]:
    """Differences of AUCs [tab, 1 + resample]: the mean of the small tabs, and each tab."""
    found = {"small tabs": thousandths(one[1:].mean(0), other[1:].mean(0))}
    return found | {f"tab {tab}": thousandths(one[t], other[t]) for t, tab in enumerate(TABS)}


def run(*, quick: bool) -> dict[str, Any]:
    """All designs on k5, some on the other splits."""
    runs = Runs(keep=not quick)
    seeds: Mapping[str, Sequence[int]] = {"k5": (1,)} if quick else SEEDS
    designs = [SINGLE, DOMAIN_ID, WIDER, ASSEMBLY] if quick else [*DESIGNS]
    rows, targets = [], {}
    for split in seeds:
        chosen = [d for d in designs if split == "k5" or d in FEWER_DESIGNS]
        found = {design: tab_aucs(runs, design, split, seeds[split]) for design in chosen}
        for k, label in enumerate(LABELS):
            auc = {design: aucs[k] for design, (aucs, _) in found.items()}
            where = {"split": split, "label": label}
            for design, own in auc.items():
                done = runs(DESIGNS[design], SPLITS[split][0], seeds[split])
                row = where | {
                    "model": design,
                    "AUC, mean of the tabs": f"{own.mean(0)[0]:.4f}",
                    "GAUC, tab 1": f"{found[design][1][k]:.4f}",
                    "against the tab as a feature": thousandths(
                        own.mean(0), auc[DOMAIN_ID].mean(0)
                    ),
                    "against one per tab": thousandths(own.mean(0), auc[SINGLE].mean(0)),
                }
                rows.append(
                    row | by_tab(own, auc[SINGLE]) | {"dense parameters": done[0]["parameters"]}
                )
            own, single, wider = auc[ASSEMBLY], auc[SINGLE], auc[WIDER]
            rows.append(where | {"model": "the assembly, against the wider"} | by_tab(own, wider))
            said = f"{split}, {label}: the assembly"
            gain, error = difference(own[1:].mean(0), single[1:].mean(0))
            targets[f"{said} - one model per tab, small tabs"] = common.target(gain, 0.020)
            targets[f"{said} - one model per tab, small tabs, lower end of 95 %"] = common.target(
                gain - 1.96 * error, 0
            )
            worst = min(np.divide(*difference(own[t], single[t])) for t in range(len(TABS)))
            targets[f"{said} - one model per tab, worst tab in standard errors"] = common.target(
                worst, -2
            )
            for other in (DOMAIN_ID, WIDER):
                gain, _ = difference(own.mean(0), auc[other].mean(0))
                targets[f"{said} - {other}"] = common.target(gain, -0.005)
            gain, error = difference(own[1], wider[1])
            targets[f"{said} - {WIDER}, tab 0, lower end of 95 %"] = common.target(
                gain - 1.96 * error, 0
            )
    return {
        "data_sha256": {
            part: common.sha256(WORK / part) for split in seeds for part in SPLITS[split]
        },
        "rows": rows,
        "targets": targets,
    }
