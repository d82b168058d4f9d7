"""Query rows and their support: who is held out, how many rows, and that support is older."""

from __future__ import annotations

import os
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qianmo.configs import history as history_config
from qianmo.configs import movielens_1m_melu
from qianmo.layers.schema import Schema
from qianmo.pipelines.data import readers, statistics
from qianmo.pipelines.datasets import movielens_1m, protocols

MOVIELENS = pytest.mark.skipif(
    "QIANMO_MOVIELENS_1M" not in os.environ,
    reason="QIANMO_MOVIELENS_1M: folder of ml-1m, which may not be shipped",
)


TIED = 60  # rows of one time


def log() -> pa.Table:
    """Rows in order of time, of users with 1 to about 90 rows; `row` is unique."""
    random = np.random.default_rng(2)
    user = np.repeat(np.arange(40) * 3, random.integers(1, 90, 40))
    user = np.append(random.permutation(user), [1000])
    return pa.table(
        {"user": user, "row": np.arange(len(user)), "time": np.arange(len(user)) // TIED}
    )


def by_user(table: pa.Table) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for row in table.to_pylist():
        found.setdefault(row["user"], []).append(row["row"])
    return found


def before(rows: list[int], first: int, ties: protocols.Ties) -> list[int]:
    """The last 20 of rows that are older than row `first`."""
    if ties == "excluded":
        rows = [row for row in rows if row // TIED < first // TIED]
    return [row for row in rows if row < first][-20:]


each_way = pytest.mark.parametrize("ties", ["excluded", "by_row"])


@each_way
def test_new_users_are_held_out_whole(ties: protocols.Ties) -> None:
    table = log()
    own = by_user(table)
    found = protocols.new_users(table, "user", "time", seed=4, ties=ties)
    parts = {name: by_user(part) for name, part in found.items()}
    held = own.keys() - parts["train"].keys()
    assert len(held) == int(0.3 * len(own)) == 12
    assert all(parts["train"][user] == own[user] for user in parts["train"])
    assert not parts["test"].keys() & parts["valid"].keys()
    scored = parts["test"].keys() | parts["valid"].keys()
    assert scored == {user for user in held if len(own[user]) > 20} != held
    sizes = []
    for part in ("valid", "test"):
        for user, rows in parts[part].items():
            assert rows == own[user][20:]
            support = parts[f"{part}_support"].pop(user)
            assert support == before(own[user], rows[0], ties)
            sizes.append(len(support))
        assert not parts[f"{part}_support"]
    assert (min(sizes) < 20) == (ties == "excluded")
    alone = protocols.new_users(table, "user", "time", seed=4, valid_share=0.0, ties=ties)
    assert [*alone] == ["train", "test", "test_support"]
    assert by_user(alone["test"]) == parts["test"]
    assert len(own.keys() - by_user(alone["train"]).keys()) == int(0.2 * len(own))
    again = protocols.new_users(table, "user", "time", seed=4, ties=ties)
    assert by_user(again["test"]) == parts["test"]
    other = protocols.new_users(table, "user", "time", seed=5, ties=ties)
    assert by_user(other["test"]) != parts["test"]


@each_way
def test_the_last_rows_of_all_users(ties: protocols.Ties) -> None:
    table = log()
    own = by_user(table)
    found = protocols.all_users(table, "user", "time", ties=ties)
    parts = {name: by_user(part) for name, part in found.items()}
    for user, rows in own.items():
        first = len(rows) - int(0.2 * len(rows))
        second = first - int(0.1 * len(rows))
        assert parts["train"][user] == rows[:second]
        assert parts["valid"].get(user, []) == rows[second:first]
        assert parts["test"].get(user, []) == rows[first:]
        for part, start, end in (("valid", second, first), ("test", first, len(rows))):
            support = before(rows, rows[start], ties) if start < end else []
            assert parts[f"{part}_support"].get(user, []) == support
    alone = protocols.all_users(table, "user", "time", valid_share=0.0, ties=ties)
    assert [*alone] == ["train", "test", "test_support"]
    assert by_user(alone["test_support"]) == parts["test_support"]


@each_way
def test_the_next_items_are_the_last_two_of_each_user(ties: protocols.Ties) -> None:
    short = pa.table({"user": [2000, 2000], "row": [-1, -2], "time": [0, 0]})
    table = pa.concat_tables([log(), short])
    found = protocols.next_items(table, "user", "time", ties=ties)
    parts = {name: by_user(part) for name, part in found.items()}
    for user, rows in by_user(table).items():
        if len(rows) < 3:
            assert parts["train"][user] == rows
            assert all(user not in part for name, part in parts.items() if name != "train")
            continue
        assert parts["train"][user] == rows[:-2]
        assert parts["valid"][user] == rows[-2:-1]
        assert parts["test"][user] == rows[-1:]
        assert parts["valid_support"].get(user, []) == before(rows, rows[-2], ties)
        assert parts["test_support"].get(user, []) == before(rows, rows[-1], ties)


def test_new_items_come_in_small_batches() -> None:
    table = log()
    found = protocols.new_items(table, "user", known=60, least=15, rows=4)
    parts = {name: by_user(part) for name, part in found.items()}
    for item, rows in by_user(table).items():
        new = rows if 15 <= len(rows) < 60 else []
        expected = {
            "train": rows if len(rows) >= 60 else [],
            "warm_a": new[:4],
            "warm_b": new[4:8],
            "warm_c": new[8:12],
            "test": new[12:],
        }
        assert {name: parts[name].get(item, []) for name in parts} == expected


def test_support_is_older_than_the_first_row_to_score() -> None:
    table = log()
    chosen = np.random.default_rng(6).random(len(table)) < np.arange(len(table)) / 3000
    chosen &= table["user"].to_numpy() < 60
    query, rest = table.filter(chosen), table.filter(~chosen)
    found = by_user(protocols.support_before(rest, query, "user", "time"))
    expected: dict[int, list[int]] = {}
    for user, rows in by_user(query).items():
        older = [r for r in by_user(rest).get(user, []) if r // TIED < rows[0] // TIED]
        if older:
            expected[user] = older[-20:]
    assert len(expected) > 5
    assert max(map(len, expected.values())) == 20
    assert found == expected


def test_melu_scores_ten_rows_of_each_user_in_a_state() -> None:
    """Users of 1 to 120 rows in two of the states, from row to row in no order of time."""
    random = np.random.default_rng(3)
    user = random.permutation(np.repeat(np.arange(60), random.integers(1, 300, 60)))
    state = np.array(protocols.STATES)[(user % 2) + 2 * random.integers(0, 2, len(user))]
    rows = {"user": user, "row": np.arange(len(user)), "time": -np.arange(len(user)) // 2}
    parts = protocols.melu(pa.table({**rows, "state": state}), "user", "state", "time")
    query, support = (set(parts[name]["row"].to_pylist()) for name in ("test", "test_support"))
    assert not query & support
    sizes = []
    for number, name in enumerate(protocols.STATES):
        generator = np.random.default_rng(1)
        for one in range(60):
            own = np.flatnonzero((user == one) & (state == name))
            sizes.append(len(own))
            if len(own) < 13 or len(own) > 100:
                assert not {*own} & (query | support)
                continue
            order = own[generator.permutation(len(own))]
            assert {*order[-10:]} <= query
            assert {*order[:-10]} <= support
            for part in (parts["test"], parts["test_support"]):
                tasks = part.filter(np.isin(part["row"].to_numpy(), own))["task"]
                assert set(tasks.to_pylist()) == {10_000 * number + one}
    assert min(sizes) == 0
    assert max(sizes) > 100
    warm = parts["test_support"].filter(parts["test_support"]["state"].to_numpy() == "warm")
    assert parts["train"].equals(warm)
    for part in parts.values():
        assert (np.diff(part["time"].to_numpy()) >= 0).all()


def test_melus_states_within_the_training_rows() -> None:
    random = np.random.default_rng(3)
    user = random.permutation(np.repeat(np.arange(50), random.integers(3, 60, 50)))
    item = random.integers(0, 40, len(user))
    columns = {"row": np.arange(len(user)), "user": user, "item": item}
    train = pa.table({**columns, "state": ["warm"] * len(user), "task": user})
    parts = protocols.melu_within(train, "user", "item")
    found = {
        name: {column: part[column].to_numpy() for column in part.column_names}
        for name, part in parts.items()
    }
    valid, support, fit = found["valid"], found["valid_support"], found["fit"]
    both = {column: np.concatenate([valid[column], support[column]]) for column in valid}
    assert sorted(both["row"]) == list(range(len(user)))
    assert support["row"].tolist() == sorted(support["row"])
    assert fit["row"].tolist() == support["row"][support["state"] == "warm"].tolist()
    for column, count, cold in (("user", 50, (1, 3)), ("item", 40, (2, 3))):
        is_cold = np.isin(both["state"], [protocols.STATES[i] for i in cold])
        new = {*both[column][is_cold]}
        assert len(new) == count // 5
        assert not new & {*both[column][~is_cold]}
    for task in {*both["task"]}:
        own = both["task"] == task
        assert (valid["task"] == task).sum() == own.sum() // 3
        assert {*both["state"][own]} == {protocols.STATES[task // 10_000]}
        assert {*both["user"][own]} == {task % 10_000}


@MOVIELENS
def test_the_four_states_of_movielens_1m(tmp_path: pathlib.Path) -> None:
    """Counts as published here, and that training knows no user, film or row that it should not."""
    source = pathlib.Path(os.environ["QIANMO_MOVIELENS_1M"])
    if not (source / "ratings.parquet").exists():
        pytest.skip("MeLU's states are in the Parquet tables alone")
    about = movielens_1m.movielens_1m(source, tmp_path / "made", split="melu")
    expected = {"train": 95_281, "test": 69_070, "test_support": 216_823}
    assert expected.items() <= about["rows"].items()
    assert about["rows"]["valid"] + about["rows"]["valid_support"] == 95_281
    parts = {name: pq.read_table(tmp_path / "made" / f"{name}.parquet") for name in about["rows"]}
    state = parts["test"]["state"].to_numpy()
    count = [len(np.unique(parts["test"]["task"].to_numpy()[state == s])) for s in protocols.STATES]
    assert count == [2653, 668, 2863, 723]
    assert set(parts["test"]["task"].to_pylist()) == set(parts["test_support"]["task"].to_pylist())
    keys = {
        name: part["user_id"].to_numpy().astype(np.int64) * 10_000 + part["movie_id"].to_numpy()
        for name, part in parts.items()
    }
    assert not np.isin(keys["test"], keys["test_support"]).any()
    for column, cold in (("user_id", (1, 3)), ("movie_id", (2, 3))):
        known = np.isin(parts["test"][column].to_numpy(), parts["train"][column].to_numpy())
        for number, name in enumerate(protocols.STATES):
            share = known[state == name].mean()
            # Training leaves out users with over 100 ratings of known films, who rate new ones too.
            assert share == 0 if number in cold else share > 0.3, share
    rating = parts["test"]["rating"].to_numpy()
    np.testing.assert_array_equal(4 * parts["test"]["label"].to_numpy() + 1, rating)
    steps = [parts["test"][f"at_least_{k}"].to_numpy() for k in range(2, 6)]
    np.testing.assert_array_equal(1 + np.sum(steps, 0), rating)
    assert parts["test"]["rate"].null_count == 0
    assert max(map(len, parts["test"]["actor"].to_pylist())) == 4


@MOVIELENS
@pytest.mark.parametrize(
    ("split", "rows"),
    [
        (
            "new_users",
            {
                "train": 509_999,
                "valid": 66_872,
                "valid_support": 10_593,
                "test": 126_333,
                "test_support": 21_155,
            },
        ),
        (
            "all_users",
            {
                "train": 522_506,
                "valid": 71_138,
                "valid_support": 114_747,
                "test": 145_368,
                "test_support": 116_416,
            },
        ),
    ],
)
def test_movielens_1m(
    split: movielens_1m.Split, rows: dict[str, int], tmp_path: pathlib.Path
) -> None:
    source = pathlib.Path(os.environ["QIANMO_MOVIELENS_1M"])
    about = movielens_1m.movielens_1m(source, tmp_path / "made", split=split)
    assert about["rows"] == rows
    columns = ["user_id", "movie_id", "timestamp"]
    parts = {
        name: pq.read_table(tmp_path / "made" / f"{name}.parquet", columns=columns) for name in rows
    }
    users = {name: part["user_id"].to_numpy().astype(np.int64) for name, part in parts.items()}
    keys = {
        name: users[name] * 10_000 + part["movie_id"].to_numpy() for name, part in parts.items()
    }
    assert all(len(np.unique(keys[name])) == rows[name] for name in rows)
    assert not np.isin(keys["test"], [*keys["train"], *keys["test_support"]]).any()
    assert not np.isin(keys["valid"], [*keys["train"], *keys["valid_support"]]).any()
    for part in ("valid", "test"):
        assert set(users[part]) >= set(users[f"{part}_support"])
        first = np.full(7000, np.iinfo(np.int64).max)
        np.minimum.at(first, users[part], parts[part]["timestamp"].to_numpy())
        times = parts[f"{part}_support"]["timestamp"].to_numpy()
        assert (times < first[users[f"{part}_support"]]).all()
    by_row = movielens_1m.movielens_1m(source, tmp_path / "by_row", split=split, ties="by_row")
    assert by_row["rows"]["test_support"] > rows["test_support"]
    assert by_row["sha256"]["test"] == about["sha256"]["test"]
    if split == "new_users":
        assert len(np.unique(users["train"])) == 6040 - 1208 - 604
        assert not np.isin(users["test"], users["train"]).any()
    else:
        assert np.isin(keys["test_support"], [*keys["train"], *keys["valid"]]).all()
        assert np.isin(keys["valid_support"], keys["train"]).all()
    # The order within a user is the published one, as far as it is known: support, then test.
    if (source / "ratings.parquet").exists():
        ratings = pq.read_table(
            source / "ratings.parquet", columns=["user_id", "movie_id", "seq_pos"]
        )
        user, movie, place = (
            ratings[name].to_numpy().astype(np.int64) for name in ratings.column_names
        )
        places = np.full(7000 * 10_000, -1, np.int16)
        places[user * 10_000 + movie] = place
        joined = np.concatenate([keys["test_support"], keys["test"]])
        joined = joined[np.argsort(joined // 10_000, kind="stable")]
        steps = np.diff(places[joined].astype(int))
        assert (steps[np.diff(joined // 10_000) == 0] > 0).all()


@MOVIELENS
def test_the_schema_of_the_four_states_reads_them(tmp_path: pathlib.Path) -> None:
    source = pathlib.Path(os.environ["QIANMO_MOVIELENS_1M"])
    if not (source / "ratings.parquet").exists():
        pytest.skip("MeLU's states are in the Parquet tables alone")
    made = tmp_path / "made"
    movielens_1m.movielens_1m(source, made, split="melu", support_history=True)
    config = movielens_1m_melu.schema(ids=("movie_id",))
    config["features"] += history_config.features(config["features"][-1])
    schema = statistics.complete(Schema.from_config(config), made / "train.parquet")
    for part in ("test", "valid", "test_support", "valid_support", "fit"):
        blocks = list(readers.blocks(schema, made / f"{part}.parquet"))
        rows = pq.read_metadata(made / f"{part}.parquet").num_rows
        assert sum(len(block["label"]) for block in blocks) == rows
    assert schema.tables["director"].num_rows > 1000
