"""Pairs of Amazon's departments with the same users: their retrieval models, fused and apart.

A test row's item is ranked against 999 items drawn at random from those of its domain that training
knows and the user has not, the same for all models. Every model trains until NDCG@10, the mean of
its domains, has not risen for three passes on validation rows, which are one training row of each
user and domain; the best pass is tested. The wider plain model is the capacity control. Numbers are
means over the seeds; standard errors of their differences come from a bootstrap over the users.
Finished runs are kept under runs/benchmarks, from where a benchmark that was killed goes on.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import common
import numpy as np
import pyarrow.parquet as pq
import tensorflow as tf
import tf_keras
from domains import difference, draws, thousandths
from ml_collections import ConfigDict

from qianmo.configs import amazon_fused as recipes
from qianmo.layers import metrics
from qianmo.layers.schema import Schema
from qianmo.models.two_tower import TwoTower
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import readers
from qianmo.pipelines.datasets import amazon_cdr
from qianmo.pipelines.recipe import Recipe, optimizer
from qianmo.pipelines.training import runtime

SINGLE, DOMAIN_ID = "one model per domain", "one model, domain as a feature"
WIDER, FUSED = "the same, wider (capacity control)", "fused: shared + own experts, gates"
POPULARITY = "popularity"
DESIGNS = {SINGLE: "single", DOMAIN_ID: "domain_id", WIDER: "wider", FUSED: "fused"}
SEEDS = (1, 2)
NEGATIVES = 999
VALID_ROWS = 4000  # of each domain at most, which are enough to tell when to stop
MOST_PASSES, PATIENCE = 40, 3

Array = Any


class Part(NamedTuple):
    """Rows to rank, the places in the catalogue of their items, and of each row's negatives."""

    rows: dict[str, Array]
    right: Array
    others: Array

    def of(self, domain: int) -> Part:
        """The rows of one domain."""
        own = self.rows["domain"] == domain
        rows = {name: column[own] for name, column in self.rows.items()}
        return Part(rows, self.right[own], self.others[own])


class Pair(NamedTuple):
    """A pair's rows in memory."""

    folder: Any
    train: dict[str, Array]
    items: dict[str, Array]
    valid: Part
    test: Part


@functools.lru_cache(maxsize=1)
def read(pair: str) -> Pair:
    """Prepares a pair once, and draws each row's negatives."""
    source = os.environ.get("QIANMO_AMAZON_CDR")
    if not source:
        raise SystemExit(
            "Set QIANMO_AMAZON_CDR to a folder with interactions.parquet (docs/data.md); nothing "
            "says that we may ship it."
        )
    folder = common.CACHE / f"amazon_{pair}"
    if not folder.exists():
        amazon_cdr.amazon_cdr(source, folder, pair=pair)
    schema = Schema.from_config(recipes.get_config(f"{pair}-fused").schema.to_dict())
    parts = {}
    for name in ("train", "valid", "test"):
        blocks = [*readers.blocks(schema, folder / f"{name}.parquet")]
        parts[name] = {column: np.concatenate([b[column] for b in blocks]) for column in blocks[0]}
    table = pq.read_table(folder / "items.parquet")
    # By rising id, so the first domain's come before the second's.
    items = {column: table[column].to_numpy().astype(np.int64) for column in table.column_names}
    had: dict[int, list[Array]] = {}
    for name in ("train", "valid", "test"):
        for user, item in zip(parts[name]["user_id"], place(items, parts[name]), strict=True):
            had.setdefault(user, []).append(item)
    random = np.random.default_rng(0)
    sizes = np.bincount(items["domain"])

    def drawn(rows: dict[str, Array]) -> Part:
        others = np.zeros((len(rows["user_id"]), NEGATIVES), np.int32)
        for row, (user, domain) in enumerate(zip(rows["user_id"], rows["domain"], strict=True)):
            count = NEGATIVES + len(had[user])
            some = random.choice(sizes[domain], count, replace=False) + domain * sizes[0]
            others[row] = some[~np.isin(some, had[user])][:NEGATIVES]
        return Part(rows, place(items, rows), others)

    valid = parts["valid"]
    of_domains = [np.flatnonzero(valid["domain"] == domain) for domain in (0, 1)]
    some = np.concatenate([random.permutation(rows)[:VALID_ROWS] for rows in of_domains])
    valid = {name: column[some] for name, column in valid.items()}
    return Pair(folder, parts["train"], items, drawn(valid), drawn(parts["test"]))


def place(items: Mapping[str, Array], rows: Mapping[str, Array]) -> Array:
    """Where the rows' items stand in the catalogue."""
    return np.searchsorted(items["item_id"], rows["item_id"])


def ranks(u: Array, v: Array, part: Part) -> Array:
    """Rank of each row's item among its negatives; of equal scores it is the last."""
    found = []
    for start in range(0, len(u), 512):
        rows = slice(start, start + 512)
        chosen = np.concatenate([part.right[rows, None], part.others[rows]], 1)
        scores = np.matmul(v[chosen], u[rows, :, None])[:, :, 0]
        found.append(metrics.ranks(scores, np.zeros(len(chosen), np.int64)))
    return np.concatenate(found)


def model_ranks(model: TwoTower, items: Mapping[str, Array], part: Part) -> Array:
    """`ranks` by a model."""
    v, _ = model.item_vectors({name: tf.constant(column) for name, column in items.items()})
    u, _ = model.user_vectors({name: tf.constant(column) for name, column in part.rows.items()})
    return ranks(u.numpy(), v.numpy(), part)


def ndcg(found: Array) -> Array:
    """NDCG@10 of each rank."""
    return np.where(found <= 10, 1 / np.log2(1 + found), 0.0)


def trained(
    config: ConfigDict, pair: str, seed: int, most_passes: int
) -> tuple[Array, dict[str, Any]]:
    """Test ranks of a recipe's best pass, in the order of its domains' rows, and how it went."""
    tf_keras.backend.clear_session()
    config.train.seed = seed
    recipe = Recipe.from_config(config.to_dict())
    data = read(pair)
    model = run_dir.build(recipe)
    assert isinstance(model, TwoTower)
    train = recipe.train
    model.compile(
        optimizer(train.optimizer, "train.optimizer"),
        optimizer(train.table_optimizer, "train.table_optimizer"),
    )
    rows, valid, test = data.train, data.valid, data.test
    for domain in recipe.schema.only_domains:
        rows = {name: column[rows["domain"] == domain] for name, column in rows.items()}
        valid, test = valid.of(domain), test.of(domain)
    batches = tf.nest.map_structure(tf.constant, readers.batch(recipe.schema, rows))
    count, size = len(rows["label"]), train.batch_size
    best, found, passes, seconds = -np.inf, np.zeros(0), 0, []
    for number in range(most_passes):
        order = np.random.default_rng([seed, number]).permutation(count)[: count // size * size]
        shuffled = tf.nest.map_structure(
            lambda x, order=order: tf.reshape(tf.gather(x, order), [-1, size, *x.shape[1:]]),
            batches,
        )
        start = time.process_time()
        model.fit(tf.data.Dataset.from_tensor_slices(shuffled), verbose=0)
        seconds.append(time.process_time() - start)
        each = ndcg(model_ranks(model, data.items, valid))
        domain = valid.rows["domain"]
        value = float(np.mean([each[domain == d].mean() for d in np.unique(domain)]))
        if value > best:
            best, passes = value, number + 1
            found = model_ranks(model, data.items, test)
        if number + 1 - passes == PATIENCE:
            break
    told = {"valid": best, "passes": passes, "seconds of a pass": min(seconds)}
    return found, told


def test_ranks(pair: str, variant: str, seed: int, most_passes: int) -> dict[str, Any]:
    """Ranks of all test rows, and what each training took."""
    names = ["single_0", "single_1"] if variant == "single" else [variant]
    domain = read(pair).test.rows["domain"]
    found, told = np.zeros(len(domain), np.int64), []
    for name in names:
        own = domain == int(name[-1]) if variant == "single" else np.full(len(domain), True)
        config = recipes.get_config(f"{pair}-{name}")
        found[own], how = trained(config, pair, seed, most_passes)
        told.append(how)
    print(f"{pair} {variant} {seed}: {told}", flush=True)
    return {"ranks": found.tolist(), "told": told}


def popularity_ranks(pair: str) -> Array:
    """Ranks by how often training has the items."""
    data = read(pair)
    counts = np.bincount(place(data.items, data.train), minlength=len(data.items["item_id"]))
    one = np.ones((len(data.test.right), 1))
    return ranks(one, counts[:, None].astype(np.float64), data.test)


def resampled(pair: str, values: Array) -> Array:
    """Means of the test rows' values by domain, and of both, [3, 1 + resample], the first of all.

    Args:
      pair: whose test rows they are.
      values: [N].
    """
    rows = read(pair).test.rows
    users, code = np.unique(rows["user_id"], return_inverse=True)
    drawn = draws(users).astype(np.float64)
    means = []
    for domain in (0, 1):
        own = rows["domain"] == domain
        total = np.bincount(code[own], values[own], len(users))
        count = np.bincount(code[own], minlength=len(users))
        means.append(drawn @ total / (drawn @ count))
    return np.stack([*means, np.mean(means, 0)])


def run(*, quick: bool) -> dict[str, Any]:
    """All pairs and designs."""
    runtime.settle()
    pairs, seeds, most_passes = [*recipes.PAIRS], SEEDS, MOST_PASSES
    if quick:
        pairs, seeds, most_passes = pairs[:1], SEEDS[:1], 1
    rows, targets, digests = [], {}, {}
    for pair in pairs:
        digests[pair] = common.sha256(read(pair).folder)
        found = {POPULARITY: [popularity_ranks(pair)]}
        told: dict[str, Any] = {}
        for design, variant in DESIGNS.items():
            runs = []
            for seed in seeds:
                unit = functools.partial(test_ranks, pair, variant, seed, most_passes)
                key = f"{pair}, {variant}, {seed}"
                runs.append(unit() if quick else common.kept("domains_amazon", key, unit))
            found[design] = [np.asarray(one["ranks"]) for one in runs]
            told[design] = [[each["passes"] for each in one["told"]] for one in runs]
        hits, gains = (
            {
                design: resampled(pair, np.mean([measure(one) for one in each], 0))
                for design, each in found.items()
            }
            for measure in (lambda ranks: ranks <= 10, ndcg)
        )
        for design in found:
            row = {"pair": pair, "model": design}
            for d, name in enumerate(("first domain", "second domain")):
                row[f"{name}, HR@10"] = f"{hits[design][d, 0]:.4f}"
                row[f"{name}, NDCG@10"] = f"{gains[design][d, 0]:.4f}"
            for name, values in (("HR@10", hits), ("NDCG@10", gains)):
                for other in (SINGLE, DOMAIN_ID):
                    gain = thousandths(values[design][2], values[other][2])
                    row[f"{name} against {other}"] = gain
            row["passes"] = "; ".join(", ".join(map(str, one)) for one in told.get(design, ()))
            rows.append(row)
        for other in (SINGLE, DOMAIN_ID, WIDER):
            gain, error = difference(gains[FUSED][2], gains[other][2])
            targets[f"{pair}: NDCG@10 of the fused model - {other}, lower end of 95 %"] = (
                common.target(gain - 1.96 * error, 0)
            )
    if not quick:
        common.finished("domains_amazon")
    return {"data_sha256": digests, "rows": rows, "targets": targets}
