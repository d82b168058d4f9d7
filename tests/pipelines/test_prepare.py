"""The public data sets' rows: counts, values, and that no row knows of later ones."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zygote
from program_world import write_movielens

from qianmo.configs import kuairand as kuairand_config
from qianmo.configs import movielens_1m as movielens_1m_config
from qianmo.layers.schema import Schema
from qianmo.pipelines.data import readers, statistics
from qianmo.pipelines.datasets import kuairand, movielens_1m
from qianmo.pipelines.datasets.tables import filled

OUTCOMES = {"is_click", "long_view", "is_like", "is_follow", "is_profile_enter"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    output = tmp_path_factory.mktemp("kuairand") / "made"
    kuairand.kuairand(None, output)
    return output


def rows_of(file: pathlib.Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(file, columns=columns).to_pylist()
    return rows


def test_kuairand_is_split_by_day(made: pathlib.Path) -> None:
    about = json.loads((made / "data.json").read_text())
    assert list(about["rows"]) == ["train", "valid", "test", "valid_support", "test_support"]
    assert list(about["rows"].values())[:3] == [150_055, 17_226, 13_103]
    days = {}
    for part in about["rows"]:
        table = pq.read_table(made / f"{part}.parquet", columns=["date", "time_ms"])
        assert len(table) == about["rows"][part]
        assert (np.diff(table["time_ms"].to_numpy()) >= 0).all()
        days[part] = set(table["date"].to_pylist())
        assert about["sha256"][part] == readers.sha256(made / f"{part}.parquet")
    assert max(days["train"]) == 20220503
    assert (days["valid"], days["test"]) == ({20220504}, {20220505})
    assert "ShareAlike" in (made / "LICENSE").read_text()
    assert "10.1145/3511808.3557624" in (made / "ATTRIBUTION.md").read_text()


def test_kuairand_by_other_days(tmp_path: pathlib.Path, made: pathlib.Path) -> None:
    """Rows of other days are counted, and priors are those of the training days."""
    log = pq.read_table(kuairand.SAMPLE / "interactions.parquet")
    date, click = log["date"].to_numpy(), log["is_click"].to_numpy()
    days = {"train_until": 20220427, "valid_day": 20220429, "test_day": 20220502}
    about = kuairand.kuairand(None, tmp_path / "made", **days)
    rows = {
        "train": int((date <= 20220427).sum()),
        "valid": int((date == 20220429).sum()),
        "test": int((date == 20220502).sum()),
    }
    assert rows.items() <= about["rows"].items()
    between = np.isin(date, (20220428, 20220430, 20220501)).sum()
    assert about["left_out"] == {
        "of days after 20220502": int((date > 20220502).sum()),
        "of days between the parts": int(between),
    }
    assert sum(rows.values()) + sum(about["left_out"].values()) == len(log)
    assert json.loads((tmp_path / "made" / "data.json").read_text()) == about
    assert json.loads((made / "data.json").read_text())["left_out"] == {}
    table = pq.read_table(tmp_path / "made" / "train.parquet")
    new = table.filter(table["log_user_rows"].to_numpy() == 0)
    (rate,) = set(new["user_click_rate"].to_pylist())
    assert rate == np.float32(round(click[date <= 20220427].mean(), 2)) != np.float32(0.45)
    assert max(table["date"].to_pylist()) == 20220427
    group = dict(zip(table["history_group"].to_pylist(), [0] * len(table), strict=True))
    assert set(group) == {"0", "1-5", "6-20", ">20"}
    with pytest.raises(ValueError, match=r"should follow each other\. Received: 20220503, 2"):
        kuairand.kuairand(None, tmp_path / "x", valid_day=20220503)
    with pytest.raises(readers.DataError, match=r"no rows for `test_day`; its days are 2022042"):
        kuairand.kuairand(None, tmp_path / "x", test_day=20220601)
    assert not (tmp_path / "x").exists()


def test_support_is_the_last_rows_of_a_user_before_the_day(made: pathlib.Path) -> None:
    about = json.loads((made / "data.json").read_text())
    assert about["rows"]["valid_support"] == 69_834
    assert about["rows"]["test_support"] == 61_420
    columns = ["user_id", "video_id", "time_ms", "date", "tab", "is_click", "user_click_rate"]
    parts = {
        name: pq.read_table(made / f"{name}.parquet", columns=columns) for name in about["rows"]
    }
    before = pa.concat_tables([parts["train"], parts["valid"]])
    for part, day, earlier in (("valid", 20220504, parts["train"]), ("test", 20220505, before)):
        own: dict[int, list[Any]] = {}
        for row in earlier.to_pylist():
            own.setdefault(row["user_id"], []).append(row)
        first: dict[int, int] = {}
        for row in parts[part].to_pylist():
            assert row["date"] == day
            first.setdefault(row["user_id"], row["time_ms"])
        support: dict[int, list[Any]] = {}
        for row in parts[f"{part}_support"].to_pylist():
            assert row["date"] < day
            assert row["time_ms"] < first[row["user_id"]]
            support.setdefault(row["user_id"], []).append(row)
        for user in first:
            older = [row for row in own.get(user, []) if row["time_ms"] < first[user]]
            assert support.get(user, []) == older[-20:]


def test_the_recipe_reads_every_row(made: pathlib.Path) -> None:
    schema = Schema.from_config(kuairand_config.schema())
    complete = statistics.complete(schema, made / "train.parquet")
    assert complete.is_complete
    assert complete.tables["video_id"].vocabulary is not None
    for part, count in (("train", 150_055), ("valid", 17_226), ("test", 13_103)):
        blocks = readers.blocks(complete, made / f"{part}.parquet")
        assert sum(len(block["is_click"]) for block in blocks) == count
    assert not OUTCOMES & set(complete.input_names)


def test_no_row_knows_of_its_own_or_later_ones(made: pathlib.Path) -> None:
    log = rows_of(kuairand.SAMPLE / "interactions.parquet")
    by_user: dict[int, list[dict[str, Any]]] = {}
    for row in log:
        by_user.setdefault(row["user_id"], []).append(row)
    history = {row["user_id"]: row for row in rows_of(kuairand.SAMPLE / "history.parquet")}
    columns = ["user_id", "time_ms", "date", "watched", "liked", "long_watched", "num_history"]
    columns.append("history_group")
    parts = [rows_of(made / f"{part}.parquet", columns) for part in ("train", "valid", "test")]
    rows = [row for part in parts for row in part]
    assert len(rows) == len(log)
    # The busiest users, some without history, and some whose rows share a time.
    busiest = sorted(by_user, key=lambda user: -len(by_user[user]))[:20]
    new = [user for user in by_user if user not in history][:20]
    ties = [u for u, own in by_user.items() if len({r["time_ms"] for r in own}) < len(own)][:20]
    chosen = {*busiest, *new, *ties}
    assert len(new) == len(ties) == 20

    checked = 0
    for row in rows:
        if row["user_id"] not in chosen:
            continue
        none = {"watched": [], "liked": [], "long_watched": [], "history_len": 0}
        before = history.get(row["user_id"], none)
        earlier = [r for r in by_user[row["user_id"]] if r["time_ms"] < row["time_ms"]]
        watched = before["watched"] + [r["video_id"] for r in earlier]
        # Outcomes are seen from the next day on.
        of_earlier_days = [r for r in earlier if r["date"] < row["date"]]
        liked = before["liked"] + [r["video_id"] for r in of_earlier_days if r["is_like"]]
        long_watched = [r["video_id"] for r in of_earlier_days if r["long_view"]]
        long_watched = before["long_watched"] + long_watched
        in_training = sum(r["date"] <= 20220503 for r in earlier)
        group = next(
            name
            for name, most in (("0", 0), ("1-5", 5), ("6-20", 20), (">20", np.inf))
            if in_training <= most
        )
        assert row["watched"] == watched[-20:]
        assert row["liked"] == liked[-20:]
        assert row["long_watched"] == long_watched[-20:]
        assert row["num_history"] == before["history_len"] + len(earlier)
        assert row["history_group"] == group
        checked += 1
    assert checked > 1000


def test_rates_are_of_earlier_days(made: pathlib.Path) -> None:
    """Counts the rows of earlier days one by one, for every 40th row."""
    by_user: dict[int, list[dict[str, Any]]] = {}
    for row in rows_of(kuairand.SAMPLE / "interactions.parquet"):
        by_user.setdefault(row["user_id"], []).append(row)
    history = {row["user_id"]: row for row in rows_of(kuairand.SAMPLE / "history.parquet")}
    columns = ["user_click_rate", "user_click_lift", "user_long_view_rate", "user_tab_click_rate"]
    columns.append("log_user_rows")
    read = ["user_id", "date", "tab", *columns]
    parts = [rows_of(made / f"{part}.parquet", read) for part in ("train", "valid", "test")]
    tab_rates = {0: 0.08, 1: 0.5, 2: 0.47, 4: 0.6, 6: 0.14}
    for row in [row for part in parts for row in part][::40]:
        earlier = [r for r in by_user[row["user_id"]] if r["date"] < row["date"]]
        before = history.get(row["user_id"], {"recent_views": 0, "recent_long_views": 0})
        count, views = len(earlier), len(earlier) + before["recent_views"]
        clicks = sum(r["is_click"] for r in earlier)
        expected = sum(tab_rates.get(r["tab"], 0.45) for r in earlier)
        long_views = sum(r["long_view"] for r in earlier) + before["recent_long_views"]
        of_tab = [r["is_click"] for r in earlier if r["tab"] == row["tab"]]
        want = (
            (clicks + 5 * 0.45) / (count + 5),
            (clicks - expected) / (count + 5),
            (long_views + 5 * 0.32) / (views + 5),
            (sum(of_tab) + 3 * tab_rates.get(row["tab"], 0.45)) / (len(of_tab) + 3),
            np.log(1 + count),
        )
        assert [row[name] for name in columns] == pytest.approx(want, rel=1e-5, abs=1e-6)


def test_no_feature_knows_of_a_label_of_its_day_or_a_later_one(
    made: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Flips all labels of the validation day and of the test day."""
    log = pq.read_table(kuairand.SAMPLE / "interactions.parquet")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("users", "videos", "history"):
        os.link(kuairand.SAMPLE / f"{name}.parquet", source / f"{name}.parquet")
    flip = log["date"].to_numpy() >= 20220504
    for name in OUTCOMES:
        values = log[name].to_numpy()
        flipped = pa.array(np.where(flip, 1 - values, values))
        log = log.set_column(log.schema.get_field_index(name), name, flipped)
    pq.write_table(log, source / "interactions.parquet")
    kuairand.kuairand(source, tmp_path / "flipped")
    differing = {}
    for part in ("train", "valid", "test"):
        was = pq.read_table(made / f"{part}.parquet")
        now = pq.read_table(tmp_path / "flipped" / f"{part}.parquet")
        differing[part] = {c for c in was.column_names if not now[c].equals(was[c])}
    assert differing["train"] == set()
    assert differing["valid"] == OUTCOMES
    # The test day sees the flipped labels of the day before it, in these features alone.
    seen = {"user_click_rate", "user_click_lift", "user_long_view_rate", "user_tab_click_rate"}
    assert differing["test"] == OUTCOMES | seen | {"liked", "long_watched"}


def test_later_rows_change_nothing_in_earlier_ones(tmp_path: pathlib.Path) -> None:
    """Cuts the log at a moment: the rows up to it must be the same in every column."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("users", "videos", "history"):
        os.link(kuairand.SAMPLE / f"{name}.parquet", source / f"{name}.parquet")
    log = pq.read_table(kuairand.SAMPLE / "interactions.parquet")
    day = log.filter(log["date"].to_numpy() == 20220428)
    moment = day["time_ms"][5_000].as_py()
    pq.write_table(log.filter(log["time_ms"].to_numpy() <= moment), source / "interactions.parquet")
    days = {"train_until": 20220426, "valid_day": 20220427, "test_day": 20220428}
    kuairand.kuairand(source, tmp_path / "cut", **days)
    kuairand.kuairand(None, tmp_path / "whole", **days)
    for part in ("train", "valid", "test"):
        cut, whole = (
            pq.read_table(tmp_path / name / f"{part}.parquet") for name in ("cut", "whole")
        )
        assert len(cut) > 5_000
        assert (len(cut) == len(whole)) == (part != "test")
        assert cut.equals(whole.slice(0, len(cut)))


def test_kuairand_values(made: pathlib.Path) -> None:
    table = pq.read_table(made / "test.parquet")
    assert all(column.null_count == 0 for column in table.columns)
    users = {row["user_id"]: row for row in rows_of(kuairand.SAMPLE / "users.parquet")}
    videos = {row["video_id"]: row for row in rows_of(kuairand.SAMPLE / "videos.parquet")}
    log = [r for r in rows_of(kuairand.SAMPLE / "interactions.parquet") if r["date"] == 20220505]
    unknown = 0
    for row, source in list(zip(table.to_pylist(), log, strict=True))[::50]:
        user, video = users[row["user_id"]], videos[row["video_id"]]
        for name in ("user_id", "video_id", "time_ms", "tab", *OUTCOMES):
            assert row[name] == source[name], name
        assert row["hour"] == source["hourmin"] // 100
        assert row["user_active_degree"] == user["user_active_degree"]
        assert row["onehot_feat12"] == (
            -1 if user["onehot_feat12"] is None else user["onehot_feat12"]
        )
        assert row["author_id"] == video["author_id"]
        tags = [int(tag) for tag in (video["tag"] or "-1").split(",")]
        assert (row["tags"], row["tag"]) == (tags, tags[0])
        seconds = source["duration_ms"] / 1000
        assert row["log_duration"] == pytest.approx(np.log(1 + seconds), rel=1e-6)
        bounds = [0, 7, 18, 30, 60, 120, 240, np.inf]
        if seconds == 0:
            unknown += 1
            assert row["duration_bucket"] == -1
        else:
            bucket = row["duration_bucket"]
            assert bounds[bucket] <= seconds < bounds[bucket + 1]
    assert unknown > 0


def test_the_shipped_sample_is_small_and_without_outcomes_beyond_the_labels() -> None:
    files = list(kuairand.SAMPLE.iterdir())
    assert sum(file.stat().st_size for file in files) <= 4.8e6
    names = set(pq.read_schema(kuairand.SAMPLE / "interactions.parquet").names)
    assert names >= OUTCOMES
    assert not {"play_time_ms", "profile_stay_time", "comment_stay_time"} & names
    about = json.loads((kuairand.SAMPLE / "data.json").read_text())
    for name, digest in about["sha256"].items():
        assert readers.sha256(kuairand.SAMPLE / f"{name}.parquet") == digest


def published_tables(folder: pathlib.Path) -> None:
    """Tables in the publisher's columns: 30 impressions, of which 3 are duplicates."""
    random = np.random.default_rng(1)
    log = {name: random.integers(0, 2, 27) for name in (*kuairand._LOG_COLUMNS, "play_time_ms")}
    log["time_ms"] = np.repeat(np.arange(9), 3)
    log["play_time_ms"] = np.arange(27)  # else equal rows that differ here are no duplicates
    table = pa.table(log)
    pq.write_table(pa.concat_tables([table, table.slice(5, 3)]), folder / "interactions.parquet")
    users = {name: [0, 1] for name in ("user_id", *kuairand._USER_COLUMNS)}
    users["onehot_feat4"] = pa.array([None, 3.0])
    pq.write_table(pa.table({**users, "unused": [1, 2]}), folder / "users.parquet")
    videos = {name: [0, 1] for name in ("video_id", *kuairand._VIDEO_COLUMNS)}
    pq.write_table(pa.table({**videos, "tag": ["1,2", None]}), folder / "videos_basic.parquet")
    history = {
        "user_id": [1],
        "history_len": [70],
        "watch_seq": [[*range(50)]],
        "like_seq": [[4, 5]],
        "long_watch_seq": [[7, 1, 1, 60]],
    }
    pq.write_table(pa.table(history), folder / "user_history_before_20220425.parquet")


def test_the_sample_is_cut_from_the_published_tables(tmp_path: pathlib.Path) -> None:
    published_tables(tmp_path)
    about = kuairand.kuairand_sample(tmp_path, tmp_path / "sample")
    assert about["left_out"] == {"that are exact duplicates of others": 3}
    assert about["rows"] == {"interactions": 27, "users": 2, "videos": 2, "history": 1}
    log = pq.read_table(tmp_path / "sample" / "interactions.parquet")
    source = pq.read_table(tmp_path / "interactions.parquet").slice(0, 27)
    for name in kuairand._LOG_COLUMNS:
        assert log[name].to_pylist() == source[name].to_pylist()
    assert rows_of(tmp_path / "sample" / "history.parquet") == [
        {
            "user_id": 1,
            "history_len": 70,
            "watched": [*range(30, 50)],
            "liked": [4, 5],
            "long_watched": [7, 1, 1, 60],
            "recent_views": 50,
            "recent_long_views": 2,
        }
    ]
    assert rows_of(tmp_path / "sample" / "users.parquet")[0]["onehot_feat4"] is None
    assert (tmp_path / "sample" / "LICENSE").exists()


@pytest.mark.skipif(
    "QIANMO_KUAIRAND" not in os.environ, reason="QIANMO_KUAIRAND: folder of KuaiRand-Pure's tables"
)
def test_the_shipped_sample_is_made_from_the_published_tables(tmp_path: pathlib.Path) -> None:
    kuairand.kuairand_sample(os.environ["QIANMO_KUAIRAND"], tmp_path / "sample")
    for name in ("interactions", "users", "videos", "history"):
        again = pq.read_table(tmp_path / "sample" / f"{name}.parquet")
        assert again.equals(pq.read_table(kuairand.SAMPLE / f"{name}.parquet"))


def test_movielens_from_the_publishers_files(tmp_path: pathlib.Path) -> None:
    write_movielens(tmp_path / "ml-1m")
    about = movielens_1m.movielens_1m(tmp_path / "ml-1m", tmp_path / "out")
    assert about["rows"] == {"train": 32, "test": 8}
    assert about["left_out"] == {"of rating 3, which is neither a like nor a dislike": 10}
    rows = [
        row for part in ("train", "test") for row in rows_of(tmp_path / "out" / f"{part}.parquet")
    ]
    # Rating 1 + i % 5 at time 1000 - i; 3 is left out, the last is the earliest.
    kept = [i for i in reversed(range(50)) if i % 5 != 2]
    assert [row["timestamp"] for row in rows] == [1000 - i for i in kept]
    assert [row["label"] for row in rows] == [int(i % 5 >= 3) for i in kept]
    assert rows[0] == {
        "user_id": 2,
        "movie_id": 2,
        "gender": "M",
        "age": 56,
        "occupation": 16,
        "zip_code": "70072-1",
        "first_genre": "Animation",
        "genres": ["Animation"],
        "year": 1995,
        "label": 1,
        "timestamp": 951,
    }
    assert rows[1]["genres"] == ["Crime", "Drama"]
    assert rows[1]["year"] == 1994


def test_movielens_random_split(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "ml-1m"
    write_movielens(source)
    parts: list[list[list[int]]] = []
    for number, seed in enumerate((0, 0, 1)):
        output = tmp_path / str(number)
        about = movielens_1m.movielens_1m(source, output, split="random", seed=seed)
        assert about["rows"] == {"train": 32, "valid": 4, "test": 4}
        files = [output / f"{part}.parquet" for part in about["rows"]]
        parts.append([[row["timestamp"] for row in rows_of(file)] for file in files])
    assert parts[0] == parts[1] != parts[2]
    train, valid, test = parts[0]
    assert sorted(train + valid + test) == [1000 - i for i in reversed(range(50)) if i % 5 != 2]
    assert train == sorted(train)


def test_movielens_ages_are_domains_of_all_ratings(tmp_path: pathlib.Path) -> None:
    write_movielens(tmp_path / "ml-1m")
    about = movielens_1m.movielens_1m(tmp_path / "ml-1m", tmp_path / "out", split="ages")
    assert about["rows"] == {"train": 40, "valid": 5, "test": 5}
    rows = [row for part in about["rows"] for row in rows_of(tmp_path / "out" / f"{part}.parquet")]
    assert {(row["age"], row["age_group"]) for row in rows} == {(1, 0), (25, 1), (56, 2)}
    stars = {row["timestamp"]: 1 + (1000 - row["timestamp"]) % 5 for row in rows}
    assert all(row["label"] == (stars[row["timestamp"]] >= 4) for row in rows)


def test_movielens_next_item(tmp_path: pathlib.Path) -> None:
    write_movielens(tmp_path / "ml-1m")
    about = movielens_1m.movielens_1m(tmp_path / "ml-1m", tmp_path / "out", split="next_item")
    parts = {part: rows_of(tmp_path / "out" / f"{part}.parquet") for part in about["rows"]}
    rows = sorted(parts["train"] + parts["valid"] + parts["test"], key=lambda row: row["timestamp"])
    assert len(rows) == 50
    assert {row["label"] for row in rows} == {1}
    for user in {row["user_id"] for row in rows}:
        own = [row for row in rows if row["user_id"] == user]
        films = [row["movie_id"] for row in own]
        assert [row["watched"] for row in own] == [
            films[max(0, i - 20) : i] for i in range(len(films))
        ]
        assert own[-1] in parts["test"]
    items = parts["items"]
    assert sorted({row["movie_id"] for row in rows}) == [item["movie_id"] for item in items]
    assert items[0].keys() == {"movie_id", "first_genre", "genres", "year"}


@pytest.mark.skipif(
    "QIANMO_MOVIELENS_1M" not in os.environ,
    reason="QIANMO_MOVIELENS_1M: folder of ml-1m, which may not be shipped",
)
def test_movielens_1m(tmp_path: pathlib.Path) -> None:
    source = os.environ["QIANMO_MOVIELENS_1M"]
    about = movielens_1m.movielens_1m(source, tmp_path / "time")
    assert about["rows"] == {"train": 591_209, "test": 147_803}
    likes = sum(
        pq.read_table(tmp_path / "time" / f"{part}.parquet")["label"].to_numpy().sum()
        for part in ("train", "test")
    )
    assert likes == 348_971 + 226_310
    schema = Schema.from_config(movielens_1m_config.schema())
    complete = statistics.complete(schema, tmp_path / "time" / "train.parquet")
    assert [f.num_rows for f in complete.categorical[:5]] == [6042, 3954, 3, 8, 22]
    about = movielens_1m.movielens_1m(source, tmp_path / "random", split="random")
    assert about["rows"] == {"train": 591_209, "valid": 73_901, "test": 73_902}


def test_an_output_is_whole_or_absent(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_movielens(tmp_path / "ml-1m")
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(readers, "sha256", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            movielens_1m.movielens_1m(tmp_path / "ml-1m", output)
    assert [path.name for path in tmp_path.iterdir()] == ["ml-1m"]

    movielens_1m.movielens_1m(tmp_path / "ml-1m", output)
    (output / "mine").touch()
    with pytest.raises(ValueError, match=r"exists\. Give another output, or --overwrite"):
        movielens_1m.movielens_1m(tmp_path / "ml-1m", output)
    assert (output / "mine").exists()
    movielens_1m.movielens_1m(tmp_path / "ml-1m", output, overwrite=True)
    assert sorted(path.name for path in output.iterdir()) == [
        "data.json",
        "test.parquet",
        "train.parquet",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ml-1m", "out"]


def test_nulls_get_a_value_that_no_row_holds() -> None:
    assert filled(pa.chunked_array([[3, None]])).to_pylist() == [3, -1]
    assert filled(pa.chunked_array([["a", None]])).to_pylist() == ["a", "unknown"]
    assert filled(pa.chunked_array([["unknown", "a"]])).to_pylist() == ["unknown", "a"]
    with pytest.raises(readers.DataError, match=r"nulls should become -1, which a column .* holds"):
        filled(pa.chunked_array([[-1, None]]))


def test_bad_sources_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(readers.DataError, match=r"ratings\.parquet: no such file\. `source`"):
        movielens_1m.movielens_1m(tmp_path, tmp_path / "out")
    write_movielens(tmp_path / "ml-1m")
    (tmp_path / "ml-1m" / "users.dat").write_text("1::F::1::10::48067\n2::M::56\n")
    with pytest.raises(readers.DataError, match=r"users\.dat, row 1 .*should have 5 fields"):
        movielens_1m.movielens_1m(tmp_path / "ml-1m", tmp_path / "out")
    (tmp_path / "ml-1m" / "users.dat").write_text("1::F::1::10::48067\n")
    with pytest.raises(readers.DataError, match="`user_id` 2 is used, but its table has no such"):
        movielens_1m.movielens_1m(tmp_path / "ml-1m", tmp_path / "out")


def test_the_program(tmp_path: pathlib.Path, programs: zygote.Zygote) -> None:
    write_movielens(tmp_path / "ml-1m")

    def run(*arguments: str) -> zygote.Ended:
        return programs.run("prepare", *arguments)

    output = f"--output={tmp_path / 'out'}"
    assert "needs --source; see --help" in run("--dataset=movielens_1m", output).stderr
    source = f"--source={tmp_path / 'ml-1m'}"
    done = run("--dataset=movielens_1m", "--split=random", source, output)
    assert done.code == 0, done.stderr
    assert "train.parquet: 32 rows, sha256 " in done.stdout
    assert "left out: 10 rows of rating 3, which is neither a like nor a dislike" in done.stdout
    assert "exists" in run("--dataset=movielens_1m", source, output).stderr
    assert run("--dataset=movielens_1m", "--overwrite", source, output).code == 0
    assert (tmp_path / "out" / "test.parquet").exists()
    assert not (tmp_path / "out" / "valid.parquet").exists()
