"""Two retrieval models fused, on made rows of two domains: prepared, trained, exported, served.

The users are the same. Each likes one half of a domain's items, and in the second domain the other
half than in the first.
"""

from __future__ import annotations

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from served import close

from qianmo.configs import amazon_fused
from qianmo.export.retrieval import export_retrieval
from qianmo.export.saved_model import export_in_graph, op_types, session
from qianmo.models.two_tower import TwoTower
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import readers
from qianmo.pipelines.data.replay import first_rows
from qianmo.pipelines.datasets import amazon_cdr
from qianmo.pipelines.evaluation import retrieval
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training.run import Run

USERS, ITEMS, ROWS = 40, 40, 12


def published(folder: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for user in range(USERS):
        for domain, name in enumerate(("left", "right")):
            half = (user + domain) % 2 * (ITEMS // 2)
            drawn = half + rng.permutation(ITEMS // 2)[: ROWS + 1]
            rows += [("left_right", name, user, int(i), "train") for i in drawn[1:]]
            rows.append(("left_right", name, user, int(drawn[0]), "test"))
    rows.append(("left_right", "left", 0, ITEMS, "test_item_unseen_in_train"))
    rows.append(("left_up", "up", 0, 7, "train"))
    names = ("pair", "domain", "user_id", "item_id", "split")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(pa.table(columns), folder / "interactions.parquet")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("rows")
    published(folder)
    amazon_cdr.amazon_cdr(folder, folder / "prepared", pair="left_right")
    return folder / "prepared"


@pytest.fixture(scope="module")
def trained(
    data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TwoTower, Recipe, float]:
    config = amazon_fused.get_config("cloth_sport-fused")
    counts = {"user_id": USERS, "domain": 2}
    for feature in config.schema.features:
        feature["num_ids"] = counts.get(feature["name"], 2 * ITEMS + 1)
    for part in ("train", "valid", "test"):
        config.data[part] = str(data / f"{part}.parquet")
    config.data.catalogue = str(data / "items.parquet")
    config.model.embedding_l2, config.model.dropout = 0.0, 0.0  # some 1,000 rows are few enough
    config.train.batch_size, config.train.epochs, config.train.patience = 64, 8, 8
    for name in ("optimizer", "table_optimizer"):
        config.train[name].learning_rate = 0.01
    folder = tmp_path_factory.mktemp("model")
    report = Run(Recipe.from_config(config.to_dict()), folder).train()
    model, recipe = run_dir.load(folder)
    assert isinstance(model, TwoTower)
    return model, recipe, report["test"]["model"]["label"]["all"]["hr_10"]


def test_rows_are_of_one_pair_and_ids_of_one_domain(data: pathlib.Path) -> None:
    train, valid, test, items = (
        {name: column.to_numpy() for name, column in zip(t.column_names, t.columns, strict=True)}
        for t in (pq.read_table(data / f"{p}.parquet") for p in ("train", "valid", "test", "items"))
    )
    assert len(train["label"]) + len(valid["label"]) == 2 * USERS * ROWS
    assert len(test["label"]) == 2 * USERS
    assert len({*zip(valid["user_id"], valid["domain"], strict=True)}) == len(valid["label"])
    for part in (train, valid, test):
        # The first domain's ids end at the item that no row of training has.
        np.testing.assert_array_equal(part["item_id"] > ITEMS, part["domain"] == 1)
        assert np.isin(part["item_id"], items["item_id"]).all()
    assert np.isin(valid["item_id"], train["item_id"]).all()
    had = {(user, item) for user, item in zip(train["user_id"], train["item_id"], strict=True)}
    for part in (train, valid, test):
        columns = (part[name] for name in ("user_id", "item_id", "bought_0", "bought_1"))
        for user, item, *lists in zip(*columns, strict=True):
            for domain, bought in enumerate(lists):
                own = {i for u, i in had if u == user and (i > ITEMS) == domain}
                assert {*bought} == own - {item}


def test_it_learns_what_users_like_in_each_domain(trained: tuple[TwoTower, Recipe, float]) -> None:
    # Of 40 items of the domain some 12 are known; chance alone finds 10 of 28.
    assert trained[2] > 0.7


def test_the_export_recommends_items_of_the_user_s_domain(
    trained: tuple[TwoTower, Recipe, float], tmp_path: pathlib.Path
) -> None:
    model, recipe, _ = trained
    rows = first_rows(model.schema, recipe.data.test, 60)
    items = retrieval.item_rows(model, recipe.data.catalogue)
    folder, worst = export_retrieval(model, tmp_path / "two_tower", rows, items, best=5)
    assert worst <= 1e-6
    assert export_in_graph(model, tmp_path / "scores", rows)[1] <= 1e-6
    assert not {op for op in op_types(folder) if ">" in op}
    user = {name: column[:USERS] for name, column in rows.items() if name != "item_id"}
    user["domain"] = np.arange(USERS) % 3  # 2 is unknown
    with session(folder) as run:
        u, v = run("user", user)["vector"], run("item", items)["vector"]
        found = run("recommend", user)
    scores = u @ v.T
    known = user["domain"][:, None] < 2
    scores[known & (items["domain"][None] != user["domain"][:, None])] = -np.inf
    order = np.argsort(-scores, 1, kind="stable")[:, :5]
    np.testing.assert_allclose(
        found["score"], np.take_along_axis(scores, order, 1), rtol=1e-5, atol=1e-6
    )
    # Items whose scores differ by rounding alone may change places.
    place = {item: i for i, item in enumerate(items["item_id"].tolist())}
    first = [scores[i, place[item]] for i, item in enumerate(found["item_id"][:, 0].tolist())]
    close(first, scores.max(1))


def test_an_unknown_domain_has_the_shared_parts_alone(
    trained: tuple[TwoTower, Recipe, float],
) -> None:
    model = trained[0]

    def vectors(domain: int) -> tuple[np.ndarray, np.ndarray]:
        ids = tf.range(5, dtype=tf.int64)
        features = {"domain": tf.fill([5], tf.constant(domain, tf.int64))}
        lists = {name: tf.zeros([5, 1], tf.int64) for name in ("bought_0", "bought_1")}
        lists |= {f"{name}_length": tf.ones([5], tf.int64) for name in [*lists]}
        u = model.user_vectors({**features, **lists, "user_id": ids})[0]
        return u.numpy(), model.item_vectors({**features, "item_id": ids})[0].numpy()

    before = {domain: vectors(domain) for domain in (0, 7)}
    own = [model.user_bottom.bottom.own, model.item_bottom.own]
    kept = [(v, v.numpy()) for layer in own for v in layer.trainable_variables]
    for variable, value in kept:
        variable.assign(2 * value + 1)
    after = {domain: vectors(domain) for domain in (0, 7)}
    for variable, value in kept:
        variable.assign(value)
    np.testing.assert_array_equal(before[7], after[7])
    assert np.abs(np.subtract(before[0], after[0])).max(axis=(1, 2)).min() > 1e-3


def test_refusals(
    trained: tuple[TwoTower, Recipe, float], data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    model, recipe, _ = trained
    rows = pq.read_table(recipe.data.test)
    wrong = rows.set_column(1, "domain", pa.array(1 - rows["domain"].to_numpy()))
    pq.write_table(wrong, tmp_path / "wrong.parquet")
    with pytest.raises(readers.DataError, match=r"item \d+ is of another domain"):
        retrieval.measure(
            model, str(tmp_path / "wrong.parquet"), recipe.data.catalogue, [recipe.data.train]
        )
    with pytest.raises(readers.DataError, match=r"`pair` should name two domains.*'left_down'"):
        amazon_cdr.amazon_cdr(data.parent, tmp_path / "new", pair="left_down")
    with pytest.raises(ValueError, match="The variant should be one of"):
        amazon_fused.get_config("cloth_sport-both")
