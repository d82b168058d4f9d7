"""A model of several domains beside the models of one domain that it replaces."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from qianmo.configs.base import base_config
from qianmo.layers import metrics
from qianmo.pipelines import run_dir
from qianmo.pipelines.evaluation import compare, cost, paired
from qianmo.pipelines.evaluation.report import head_function
from qianmo.pipelines.evaluation.scores import Scored, evaluate, score, table
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training.preparing import completed

SCENES = (1, 4, 7)
ROWS = 1200
MODEL = {"name": "mlp", "units": (5,), "embedding_stddev": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Rows of three scenes; 4 alone has queries and buys, and so files of its own for its model."""
    folder = tmp_path_factory.mktemp("rows")
    for seed, part in enumerate(("train", "test")):
        random = np.random.default_rng(seed)
        scene = random.choice(SCENES, ROWS, p=(0.5, 0.4, 0.1))
        columns = {
            "scene": scene,
            "user": random.integers(0, 90, ROWS),
            "seen": [random.integers(0, 30, random.integers(0, 4)).tolist() for _ in range(ROWS)],
            "query": pa.array(random.integers(0, 20, ROWS), mask=scene != 4),
            "click": random.integers(0, 2, ROWS),
            "buy": pa.array(random.integers(0, 2, ROWS), mask=scene != 4),
        }
        rows = pa.table(columns)
        pq.write_table(rows, folder / f"{part}.parquet")
        pq.write_table(rows.filter(pa.array(scene == 4)), folder / f"{part}_4.parquet")
    return folder


def recipe(data: pathlib.Path, *only: int, **changes: Any) -> Recipe:
    """The fused model's recipe, or that of one domain."""
    config: dict[str, Any] = base_config().to_dict()
    features: list[dict[str, Any]] = [
        {"name": "user", "dim": 4},
        {"name": "seen", "dim": 4, "max_length": 3},
    ]
    if not only:
        features.append({"name": "scene", "vocabulary": SCENES, "dim": 4})
    if only in ((), (4,)):
        features.append({"name": "query", "dim": 4, **({} if only else {"domains": (4,)})})
    config["schema"] = {
        "features": features,
        "labels": ("click", "buy") if only in ((), (4,)) else ("click",),
        "domain": "scene",
        "task_id": "user",
        "only_domains": only,
        **({} if only else {"label_domains": {"buy": (4,)}}),
        **changes.pop("schema", {}),
    }
    for part in ("train", "test"):
        config["data"][part] = str(data / f"{part}{'_4' * (only == (4,))}.parquet")
    config["data"] |= changes.pop("paths", {})
    config["model"] = MODEL
    config["train"] |= {"batch_size": 100 if only else ROWS, "seed": 1 + sum(only)}
    return Recipe.from_config(config)


def saved(recipe: Recipe, folder: pathlib.Path) -> str:
    """A model directory; weights as initialised score well enough."""
    recipe = completed(recipe)
    run_dir.write(folder, run_dir.build(recipe), recipe)
    return str(folder)


def probabilities(folder: str, rows: pa.Table) -> Any:
    """Scores of rows by a model, fed by hand."""
    model, _ = run_dir.load(folder)
    features = {}
    for name in model.schema.input_names:
        if name == "seen":
            lists = [(row + [0] * 3)[:3] for row in rows["seen"].to_pylist()]
            features["seen"] = tf.constant(np.array(lists))
        elif name == "seen_length":
            features[name] = tf.constant([min(len(row), 3) for row in rows["seen"].to_pylist()])
            features[name] = tf.cast(features[name], tf.int64)
        else:
            features[name] = tf.constant(rows[name].fill_null(0).to_numpy())
    return tf.sigmoid(model(features)["model"]).numpy()


def test_a_comparison(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    fused = saved(recipe(data), tmp_path / "fused")
    singles = {d: saved(recipe(data, d), tmp_path / f"single_{d}") for d in (1, 4)}
    found = compare.compare(fused, [*singles.values()])

    test = pq.read_table(data / "test.parquet")
    by = {(e["label"], e["domain"]): e for e in found["domains"]}
    domains = [("click", 1), ("click", 4), ("click", 7), ("buy", 4), ("click", "mean")]
    assert [*by] == domains  # buys are of scene 4 alone, and so have no mean
    for (label, domain), entry in by.items():
        if domain == "mean":
            continue
        rows = test.filter(pa.array(test["scene"].to_numpy() == domain))
        y, user = rows[label].to_numpy(), rows["user"].to_numpy()
        column = ("click", "buy").index(label)
        names = {"fused": fused, **({"single": singles[domain]} if domain in singles else {})}
        assert entry["single"] == names.get("single")
        assert (entry["rows"], entry["positives"]) == (len(y), y.sum())
        assert entry["users"] == len(np.unique(user))
        for name, folder in names.items():
            p = probabilities(folder, rows)[:, column]
            assert entry["auc"][name] == pytest.approx(metrics.auc(y, p), abs=1e-6)
            if domain != 7:  # where too few users have clicks and others
                assert entry["gauc"][name] == pytest.approx(metrics.gauc(y, p, user), abs=1e-6)
    assert by["click", 7]["gauc"] is None
    mean = by["click", "mean"]["auc"]
    each = [by["click", d]["auc"]["difference"] for d in (1, 4)]
    assert mean["difference"] == pytest.approx(np.mean(each))

    costs = found["costs"]
    # Every test row is in the one batch, so a table's keys are its values there, 0 for unknown.
    known = pq.read_table(data / "train.parquet")
    keys = 0
    for d in (1, 4):
        now, before = (t.filter(pa.array(t["scene"].to_numpy() == d)) for t in (test, known))
        for name in ("user", "seen", "query")[: 2 + (d == 4)]:
            values, rows_of = (
                {x for cell in t[name].to_pylist() for x in (cell if name == "seen" else [cell])}
                for t in (now, before)
            )
            keys += len(values & rows_of) + bool(values - rows_of)
    assert costs["sum"]["keys of 1,200 rows"] == keys
    assert costs["fused"]["keys of 1,200 rows"] == 90 + 30 + 3 + 20
    # Weights and biases of 5 units on three or four vectors, and of two logits.
    assert costs["fused"]["dense parameters"] == (16 * 5 + 5) + (5 * 2 + 2)
    alone = (8 * 5 + 5) + (5 * 1 + 1) + (12 * 5 + 5) + (5 * 2 + 2)
    assert costs["sum"]["dense parameters"] == alone
    moved = 24 * (4 * keys + alone) / 1e6  # Adam reads and writes three numbers of four bytes
    assert costs["sum"]["MB moved by a step on them"] == pytest.approx(moved)
    sizes = [one["MB of an export"] for one in costs["single"].values()]
    assert costs["sum"]["MB of an export"] == sum(sizes)
    assert min(sizes) > 0.01
    steps = costs["single"][singles[4]]
    passes = -(-int((known["scene"].to_numpy() == 4).sum()) // 100)
    assert steps["s a pass"] == pytest.approx(steps["ms a step"] / 1e3 * passes)

    compare.write(tmp_path / "page" / "comparison.html", found)
    told = json.loads((tmp_path / "page" / "comparison.json").read_text())
    assert told["costs"] == costs
    page = (tmp_path / "page" / "comparison.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page
    text = compare.table(found)
    assert "No single model was given for domains 7 (click)." in text
    assert f"{by['buy', 4]['auc']['difference']:+.4f}" in text
    assert f"{by['buy', 4]['auc']['difference']:+.4f}" in page


@pytest.mark.parametrize(
    ("only", "changes", "message"),
    [
        ((), {}, r"one: .* should name its one domain; .* Received: \[\]"),
        ((1, 4), {}, r"Received: \[1, 4\]"),
        ((1,), {"labels": ("click", "buy")}, r"has in domain 1, \['click'\]. Received: 'buy'"),
        ((4,), {"labels": ("click", "like")}, r"\['click', 'buy'\]. Received: 'like'"),
    ],
)
def test_single_models_that_do_not_fit(
    data: pathlib.Path, tmp_path: pathlib.Path, only: Any, changes: Any, message: str
) -> None:
    one = recipe(data, *only, schema=changes)
    run_dir.write_json(tmp_path / "one" / run_dir.RECIPE, one.to_config())
    with pytest.raises(ValueError, match=message):
        compare.read_singles(recipe(data), [str(tmp_path / "one")])


def test_rows_that_do_not_fit(data: pathlib.Path, tmp_path: pathlib.Path) -> None:
    fused, one = recipe(data), recipe(data, 4)
    run_dir.write_json(tmp_path / "one" / run_dir.RECIPE, one.to_config())
    folder = str(tmp_path / "one")
    with pytest.raises(ValueError, match="one are both of label `click` in domain 4"):
        compare.read_singles(fused, [folder, folder])
    (single,) = compare.read_singles(fused, [folder])
    with pytest.raises(ValueError, match="one: its recipe names no test rows; give --test"):
        compare.rows_to_score("one", recipe(data, 4, paths={"test": ""}), "")
    domain, user = np.array([4, 1, 4]), np.array([8, 8, 9])
    scored = Scored(
        {}, np.array([[0, 1], [1, np.nan], [1, 1]]), {"domain": domain, "task_id": user}
    )
    alone = Scored({}, scored.labels[[0, 2]], {"task_id": user[[0, 2]]})
    assert compare.same_rows(fused, scored, single, alone).tolist() == [0, 2]
    for labels, task, message in (
        (
            [[0, 1]],
            [8],
            "domain 4, in the same order. Received: 1 rows, and the fused model 2. Give",
        ),
        ([[0, 1], [1, 0]], [8, 9], "Received: buy 0 in its row 1, and not 1.0"),
        ([[0, 1], [1, 1]], [8, 7], "Received: task_id 7 in its row 1, and not 9. Give --test"),
    ):
        alone = Scored({}, np.array(labels), {"task_id": np.array(task)})
        with pytest.raises(ValueError, match=message):
            compare.same_rows(fused, scored, single, alone)
    run_dir.write_json(tmp_path / "fused" / run_dir.RECIPE, fused.to_config())
    empty = recipe(data, 9).to_config()
    run_dir.write_json(tmp_path / "nine" / run_dir.RECIPE, empty)
    with pytest.raises(ValueError, match=r"test\.parquet: no rows of domains \(9,\)"):
        compare.compare(str(tmp_path / "fused"), [str(tmp_path / "nine")])


def place(**scores: Any) -> paired.Place:
    """Rows of 150 users, some of them often there."""
    random = np.random.default_rng(3)
    user = np.minimum(random.geometric(0.02, 2000), 150) - 1
    taste = random.normal(size=150)[user]
    labels = (taste + random.normal(size=2000) > 0).astype(float)
    noise = random.normal(size=2000)
    told = {name: level * (taste + labels) + noise for name, level in scores.items()}
    return paired.Place("click", 5, "runs/one", labels, user, told)


def test_resamples_are_metrics_of_rows_drawn_with_their_users() -> None:
    rows = place(fused=0.2, single=0.3)
    counts = np.random.default_rng(0).poisson(1.0, (4, 150)).astype(np.float32)
    for draw, auc, gauc in zip(
        counts, rows.resampled("auc", counts).T, rows.resampled("gauc", counts).T, strict=True
    ):
        # Each draw of a user is a user of its own.
        drawn = np.repeat(np.arange(2000), draw[rows.unit].astype(int))
        for s, scores in enumerate(rows.scores.values()):
            assert auc[s] == pytest.approx(metrics.auc(rows.labels[drawn], scores[drawn]))
            own = metrics.gauc(rows.labels[drawn], scores[drawn], rows.unit[drawn])
            assert gauc[s] == pytest.approx(own)


def test_a_domain_that_is_worse_off_is_named() -> None:
    rows = place(fused=0.3, single=1.0)
    better = place(fused=1.0, single=0.3)._replace(domain=6)
    alike = rows._replace(domain=7, scores=dict.fromkeys(("fused", "single"), rows.labels))
    few = rows._replace(domain=8, unit=rows.unit // 10)  # fifteen users
    entries = paired.measure([rows, better, alike, few], grouped=True)
    told = {e["domain"]: e["auc"] and e["auc"]["verdict"] for e in entries}
    assert told == {5: "worse", 6: "better", 7: "alike", 8: None, "mean": "alike"}
    *seesaw, last = compare.verdict(entries).splitlines()
    assert all(line.startswith("SEESAW: domain 5, click: ") for line in seesaw)
    assert len(seesaw) == 2
    assert last == "Metrics of fewer than 30 users are left out."
    # The standard error is that of rows drawn user by user, not of single rows.
    random = np.random.default_rng(9)
    gains = []
    for _ in range(300):
        users = random.integers(0, 150, 150)
        drawn = np.concatenate([np.flatnonzero(rows.unit == user) for user in users])
        fused, single = (
            metrics.auc(rows.labels[drawn], scores[drawn]) for scores in rows.scores.values()
        )
        gains.append(fused - single)
    assert entries[0]["auc"]["standard_error"] == pytest.approx(np.std(gains), rel=0.2)


def test_domains_of_few_users_alone_are_not_called_alike() -> None:
    rows = place(fused=0.3, single=1.0)
    entries = paired.measure([rows._replace(unit=rows.unit // 10)], grouped=True)
    assert entries[0]["auc"] is None
    first, _ = compare.verdict(entries).splitlines()
    assert first == "No domain that has a single model has rows of enough users to compare."


def test_bytes_moved_are_those_of_the_optimisers(data: pathlib.Path) -> None:
    one = completed(recipe(data, 1))
    moved = {}
    for name in ("adam", "adagrad"):
        train = dataclasses.replace(one.train, optimizer={"name": name, "learning_rate": 0.1})
        changed = dataclasses.replace(one, train=train)
        training = cost.Training(run_dir.build(one), changed, [])
        moved[name] = training.bytes_moved({"user": 10, "seen": 5})
    dense = (8 * 5 + 5) + (5 + 1)
    assert moved == {"adam": 24 * (dense + 15 * 4), "adagrad": 16 * dense + 24 * 15 * 4}


def test_a_step_is_traced_once(data: pathlib.Path) -> None:
    one = completed(recipe(data, 1))
    batches = cost.first_batches(one, 3)
    assert [len(targets["labels"]) for _, targets in batches] == [100] * 3
    training = cost.Training(run_dir.build(one), one, batches)
    before = [v.numpy() for v in training.model.trainable_variables]
    for _ in range(4):
        training.step()
    assert training._step.experimental_get_tracing_count() == 1
    pairs = zip(training.model.trainable_variables, before, strict=True)
    assert all((v.numpy() != was).any() for v, was in pairs)


def test_few_rows_have_no_line_and_a_graph_serves_all_batch_sizes(data: pathlib.Path) -> None:
    one = completed(recipe(data))
    domain = np.repeat([1, 4], [200, 20])
    scored = Scored({"model": np.full((220, 2), 0.5)}, np.ones((220, 2)), {"domain": domain})
    report = evaluate(scored, one.schema)
    assert report["model"]["buy"]["domain"]["4"]["rows"] == 20
    text = table(report)
    assert text.count("domain 1") == 2
    assert "domain 4" not in text
    assert text.endswith("(2 lines of fewer than 100 rows left out.)")
    model = run_dir.build(one)
    assert len(score(model, str(data / "test.parquet"), 500).labels) == ROWS
    assert model.probabilities.experimental_get_tracing_count() == 1
    predict = head_function(model, "model")
    for rows in (1, 3, 5):
        batch = {name: tf.zeros(rows, tf.int64) for name in ("user", "scene", "query")}
        batch |= {"seen": tf.zeros((rows, 3), tf.int64), "seen_length": tf.ones(rows, tf.int64)}
        assert predict(batch).shape == (rows, 2)


def test_domains_may_have_names_and_rows_lack_labels(data: pathlib.Path) -> None:
    fused = recipe(data)
    schema = dataclasses.replace(
        fused.schema, labels=("click",), label_domains={}, optional_labels=("click",)
    )
    fused = dataclasses.replace(fused, schema=schema)
    labels = np.array([[1.0], [np.nan], [0.0], [1.0]])
    domain = np.array([b"feed", b"home", b"home", b"feed"], object)
    scored = Scored({"model": np.array([[0.1], [0.2], [0.3], [0.4]])}, labels, {"domain": domain})
    alone = Scored({"model": np.array([[0.6], [0.7]])}, labels[1:3], {})
    single = compare.Single("home", fused, "home")
    assert compare.same_rows(fused, scored, single, alone).tolist() == [1, 2]
    feed, home = compare.places(fused, scored, "model", [(single, alone, "model")])
    assert (feed.domain, feed.labels.tolist(), list(feed.scores)) == ("feed", [1.0, 1.0], ["fused"])
    assert (home.domain, home.labels.tolist()) == ("home", [0.0])
    assert {name: found.tolist() for name, found in home.scores.items()} == {
        "fused": [0.3],
        "single": [0.7],
    }
    other = Scored(alone.probabilities, np.array([[1.0], [0.0]]), {})
    with pytest.raises(ValueError, match=r"click 1\.0 in its row 0, and not nan"):
        compare.same_rows(fused, scored, single, other)


def test_ratings_are_not_compared(data: pathlib.Path) -> None:
    fused = recipe(data)
    schema = dataclasses.replace(fused.schema, label_kinds={"buy": "rating"})
    with pytest.raises(ValueError, match="label `buy` is a rating, and models are compared by AUC"):
        compare.read_singles(dataclasses.replace(fused, schema=schema), [])
