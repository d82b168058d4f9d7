r"""Makes the training, validation and test rows of a public data set.

    qianmo-prepare --dataset=kuairand --output=runs/kuairand
    qianmo-prepare --dataset=movielens_1m --source=ml-1m --output=runs/movielens_1m
    qianmo-prepare --dataset=movielens_1m --split=random --source=ml-1m \
        --output=runs/movielens_1m_random
    qianmo-prepare --dataset=movielens_1m --split=new_users --source=ml-1m \
        --output=runs/movielens_1m_new_users
    qianmo-prepare --dataset=amazon_cdr --pair=cloth_sport --source=amazon-cdr \
        --output=runs/amazon_cloth_sport

kuairand: video impressions on Kuaishou, 25 April to 5 May 2022, split by day: the last day is the
    test part, the day before it the validation part. Needs no --source: its tables come with this
    package (CC BY-SA 4.0, see pipelines/sample/ATTRIBUTION.md).
movielens_1m: a million ratings of films; 4 and 5 are likes, 1 and 2 dislikes, 3 is left out. Its
    terms forbid shipping it: unpack https://files.grouplens.org/datasets/movielens/ml-1m.zip and
    give the folder as --source.
amazon_cdr: pairs of Amazon's departments with the same users, what each bought in both. The table
    interactions.parquet of --source has the columns pair, domain, user_id, item_id and split.
kuairand_sample: how the tables of the first were cut from the published ones (Parquet tables
    interactions, users, videos_basic and user_history_before_20220425 in --source).

The output is a new folder with train, (valid,) and test.parquet and data.json, which holds the rows
and sha256 of each. It appears only when it is whole. Beside test.parquet there may be
test_support.parquet (and beside valid.parquet its own): of each user there, the last rows that were
known by then, from which a model can adapt to the user.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from absl import flags
from tqdm import tqdm

from qianmo.pipelines import history as histories
from qianmo.pipelines import program, protocols, readers

SAMPLE = pathlib.Path(__file__).resolve().parent / "sample"
DATASETS = ("kuairand", "movielens_1m", "amazon_cdr", "kuairand_sample")
LAST_TRAIN_DAY, VALID_DAY, TEST_DAY = 20220503, 20220504, 20220505
HISTORY_LENGTH = 20
Split = Literal[
    "time", "random", "ages", "new_users", "all_users", "new_items", "next_item", "melu"
]
SPLITS: tuple[Split, ...] = get_args(Split)
_AGES = (25, 35)  # where MovieLens-1M's domains end
_ROW_GROUP = 2**16  # rows; the unit in which readers shuffle and share files

_LOG_COLUMNS = (
    "user_id",
    "video_id",
    "date",
    "hourmin",
    "time_ms",
    "is_click",
    "is_like",
    "is_follow",
    "is_profile_enter",
    "long_view",
    "duration_ms",
    "tab",
)
_LABELS = ("is_click", "long_view", "is_like", "is_follow", "is_profile_enter")
_USER_COLUMNS = (
    "user_active_degree",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days",
    "register_days_range",
    *(f"onehot_feat{i}" for i in range(18)),
)
_VIDEO_COLUMNS = ("author_id", "music_id", "music_type", "video_type", "upload_type", "tag")
_DURATION_SECONDS = (7, 18, 30, 60, 120, 240)  # 7 and 18 decide the publisher's labels
_HISTORY_GROUPS = ("0", "1-5", "6-20", ">20")
# Rates are smoothed towards those of the training days, with the weight of so many rows.
_CLICK_RATE, _LONG_VIEW_RATE = 0.45, 0.32
_TAB_CLICK_RATES = {0: 0.08, 1: 0.50, 2: 0.47, 4: 0.60, 6: 0.14}
_USER_ROWS, _USER_TAB_ROWS = 5, 3
# Of MovieLens-1M: the share of likes, and the mean of (rating - 1) / 4.
_LIKE_RATE, _MEAN_RATING = 0.78, 0.65

Tables = Mapping[str, pa.Table]


def kuairand_sample(
    source: readers.PathLike, output: readers.PathLike, *, overwrite: bool = False
) -> dict[str, Any]:
    """Cuts the shipped tables from KuaiRand-Pure's.

    Exact duplicates among the impressions are left out (180,384 of 185,061 rows stay), and so are
    the outcomes and attributes that no recipe uses. Of each user's history the last 20 videos stay,
    and of the last 50 (all that is published) the counts.

    Args:
      source: folder with interactions, users, videos_basic and user_history_before_20220425.
      output: folder to make.
      overwrite: whether an existing output is replaced.

    Returns:
      What data.json holds.
    """
    folder = pathlib.Path(source)
    log = _table(folder / "interactions.parquet")
    keys = log.column_names
    first = log.append_column("row", pa.array(np.arange(len(log)))).group_by(keys)
    rows = first.aggregate([("row", "min")])["row_min"].to_numpy()
    log = log.take(np.sort(rows)).select(_LOG_COLUMNS)

    users = _table(folder / "users.parquet").select(["user_id", *_USER_COLUMNS])
    videos = _table(folder / "videos_basic.parquet").select(["video_id", *_VIDEO_COLUMNS])
    history = _table(folder / "user_history_before_20220425.parquet")
    last: dict[str, list[Any]] = {
        name: [ids[-HISTORY_LENGTH:] for ids in history[column].to_pylist()]
        for name, column in (
            ("watched", "watch_seq"),
            ("liked", "like_seq"),
            ("long_watched", "long_watch_seq"),
        )
    }
    last["recent_views"], last["recent_long_views"] = [], []
    for watched, long_watched in zip(
        *(history[name].to_pylist() for name in ("watch_seq", "long_watch_seq")), strict=True
    ):
        # The list of long views may reach further back than the other.
        both = collections.Counter(watched) & collections.Counter(long_watched)
        last["recent_views"].append(len(watched))
        last["recent_long_views"].append(both.total())
    history = history.select(["user_id", "history_len"])
    for name, values in last.items():
        history = history.append_column(name, pa.array(values))
    tables = {"interactions": log, "users": users, "videos": videos, "history": history}
    tables = {name: _narrowed(table) for name, table in tables.items()}
    notices = [file for file in (SAMPLE / "ATTRIBUTION.md", SAMPLE / "LICENSE") if file.exists()]
    return _write(output, "kuairand_sample", tables, overwrite, notices, compression_level=19)


def kuairand(
    source: readers.PathLike | None,
    output: readers.PathLike,
    *,
    support_history: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Makes KuaiRand's rows: one an impression, features known before it, and its outcomes.

    `watched` holds the user's last 20 videos, oldest first: those of the days before the log, then
    those of the log's rows with an earlier time. Rows of the same time do not see each other.

    Outcomes of a row (clicks, long views, likes) are labels of its own day and become features on
    the next: `liked`, `long_watched` and the users' rates hold rows of earlier days alone, so no
    label of a day is in any feature of that day. A rate is (k + w r) / (n + w): k of n rows had the
    outcome, r is the training days' rate, w is 5 rows, or 3 for a user's rows of one tab. Long
    views are counted in the published histories too, clicks in the log only. Tabs differ in what a
    click is, so a lift counts clicks above the rate that the row's tab had in training.

    `valid_support` and `test_support` hold the last 20 impressions of each user before the day.

    Args:
      source: folder made by `kuairand_sample`; None takes the shipped one.
      output: folder to make.
      support_history: whether to add the columns of `history.add` for clicks, from the last 20
        rows of earlier days.
      overwrite: whether an existing output is replaced.

    Returns:
      What data.json holds.
    """
    folder = pathlib.Path(source or SAMPLE)
    log = _table(folder / "interactions.parquet")
    log = log.take(np.argsort(log["time_ms"].to_numpy(), kind="stable"))
    users = _rows_of(_table(folder / "users.parquet"), "user_id", log["user_id"])
    videos = _rows_of(_table(folder / "videos.parquet"), "video_id", log["video_id"])
    history = _table(folder / "history.parquet")
    past = _past(log, history)

    tags = pc.fill_null(videos["tag"], "-1")
    tags = pc.split_pattern(tags, ",").combine_chunks().cast(pa.list_(pa.int64()))
    seconds = log["duration_ms"].to_numpy() / 1000
    bucket = np.where(seconds > 0, np.searchsorted(_DURATION_SECONDS, seconds, "right"), -1)
    columns: dict[str, Any] = {
        "user_id": log["user_id"],
        "video_id": log["video_id"],
        "tab": log["tab"],
        "hour": pc.divide(log["hourmin"], 100),
        **{name: _filled(users[name]) for name in _USER_COLUMNS},
        **{name: _filled(videos[name]) for name in _VIDEO_COLUMNS if name != "tag"},
        "tag": pc.list_element(tags, 0),
        "tags": tags,
        "duration_bucket": bucket.astype(np.int8),
        "log_duration": np.log1p(seconds).astype(np.float32),
        **past,
        "log_num_history": np.log1p(past["num_history"]).astype(np.float32),
        **_user_rates(log, history),
        **{name: log[name] for name in _LABELS},
        "time_ms": log["time_ms"],
        "date": log["date"],
    }
    table = pa.table(columns)
    date = log["date"].to_numpy()
    parts = {
        "train": table.filter(date <= LAST_TRAIN_DAY),
        "valid": table.filter(date == VALID_DAY),
        "test": table.filter(date == TEST_DAY),
    }
    for part, day in (("valid", VALID_DAY), ("test", TEST_DAY)):
        parts[f"{part}_support"] = protocols.support_before(
            table.filter(date < day), parts[part], "user_id", "time_ms"
        )
    if support_history:
        parts = histories.add(
            parts, task="user_id", item="video_id", label="is_click", rate=_CLICK_RATE, since="date"
        )
    notices = [folder / name for name in ("ATTRIBUTION.md", "LICENSE")]
    return _write(output, "kuairand", parts, overwrite, [n for n in notices if n.exists()])


def movielens_1m(
    source: readers.PathLike,
    output: readers.PathLike,
    *,
    split: Split = "time",
    seed: int = 0,
    support_history: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Makes MovieLens-1M's rows: one a rating other than 3, `label` 1 for 4 and 5.

    Args:
      source: folder with GroupLens's ratings.dat, users.dat and movies.dat, or the same tables as
        Parquet.
      output: folder to make.
      split: "time": the first 80 % by timestamp train, the rest test. "random": 80 % train, 10 %
        valid, 10 % test. "ages": the same of all ratings, 3 like 1 and 2, with a domain
        `age_group`: 0 below 25, 1 below 35, 2 from there. "new_users" holds out 20 % of the users
        and tests on their rows after the 20th, "all_users" tests on the last 20 % of every user's
        rows; both with the 20 rows before as test_support, see `protocols`. "new_items" trains on
        films with 650 rows or more and tests on others, see `protocols.new_items`. "next_item" and
        "melu": other rows, see `movielens_1m_next_item` and `movielens_1m_melu`.
      seed: of the random splits, and of the draw of new users.
      support_history: whether to add the columns of `history.add`; for splits with support. For
        new users the training rows see histories of random lengths.
      overwrite: whether an existing output is replaced.

    Returns:
      What data.json holds.
    """
    if split not in SPLITS:
        raise ValueError(f"`split` should be one of {SPLITS}. Received: {split!r}")
    if support_history and split in ("time", "random", "ages", "new_items", "next_item"):
        raise ValueError(f"`support_history` needs a split with support. Received: {split!r}")
    if split == "melu":
        return movielens_1m_melu(
            source, output, support_history=support_history, overwrite=overwrite
        )
    if split == "next_item":
        return movielens_1m_next_item(source, output, overwrite=overwrite)
    tables = _movielens_tables(pathlib.Path(source))
    ratings = tables["ratings"]
    if split != "ages":
        ratings = ratings.filter(pc.not_equal(ratings["rating"], 3))
    ratings = _in_order(ratings, ties=split in ("new_users", "all_users"))
    is_liked = pc.cast(pc.greater_equal(ratings["rating"], 4), pa.int8())
    table = _movielens_rows(tables, ratings, is_liked)
    count = len(table)
    train = int(0.8 * count)
    if split == "time":
        parts = {"train": table.slice(0, train), "test": table.slice(train)}
    elif split == "new_users":
        parts = protocols.new_users(table, "user_id", seed=seed)
    elif split == "all_users":
        parts = protocols.all_users(table, "user_id")
    elif split == "new_items":
        parts = {**protocols.new_items(table, "movie_id"), "items": _films(table)}
    else:
        if split == "ages":
            group = np.digitize(table["age"].to_numpy(), _AGES).astype(np.int8)
            table = table.append_column("age_group", pa.array(group))
        order = np.random.default_rng(seed).permutation(count)
        cuts = np.split(order, [train, int(0.9 * count)])
        # Within a part, rows stay in order of time.
        names = ("train", "valid", "test")
        parts = {name: table.take(np.sort(cut)) for name, cut in zip(names, cuts, strict=True)}
    if support_history:
        parts = histories.add(
            parts,
            task="user_id",
            item="movie_id",
            label="label",
            rate=_LIKE_RATE,
            sizes=histories.RANDOM_SIZES if split == "new_users" else (protocols.SUPPORT_ROWS,),
        )
    return _write(output, f"movielens_1m, {split} split", parts, overwrite)


def movielens_1m_next_item(
    source: readers.PathLike, output: readers.PathLike, *, overwrite: bool = False
) -> dict[str, Any]:
    """Makes MovieLens-1M's rows for retrieval: one a rating, whatever it is; `label` is 1.

    `watched` holds the user's last 20 films before the row, oldest first. Of each user the last row
    is in test and the last but one in valid, see `protocols.next_items`; items.parquet has a row
    for each film that anyone rated.

    Args:
      source: folder as for `movielens_1m`.
      output: folder to make.
      overwrite: whether an existing output is replaced.

    Returns:
      What data.json holds.
    """
    tables = _movielens_tables(pathlib.Path(source))
    ratings = _in_order(tables["ratings"], ties=True)
    table = _movielens_rows(tables, ratings, pa.array(np.ones(len(ratings), np.int8)))
    table = histories.last_items(
        table, task="user_id", item="movie_id", rows=HISTORY_LENGTH, name="watched"
    )
    parts = protocols.next_items(table, "user_id")
    parts["items"] = _films(table)
    return _write(output, "movielens_1m, next_item split", parts, overwrite)


def amazon_cdr(
    source: readers.PathLike,
    output: readers.PathLike,
    *,
    pair: str,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Makes a pair's rows for retrieval in two domains: one an interaction; `label` is 1.

    The domains are 0 and 1, in the order of the pair's name. Items of the second get ids that
    follow on those of the first, so that an id belongs to one domain. Of each user and domain the
    publisher holds one row out, which is in test if training knows its item; another one, drawn at
    random, is in valid on the same condition. items.parquet has a row for each item of train.

    `bought_0` and `bought_1` hold what else the user bought in each domain: at most 20 items of
    train, as drawn at random, never the row's own.

    Args:
      source: folder with interactions.parquet: pair, domain, user_id, item_id and split, which is
        train, test, or something else for what is left out.
      output: folder to make.
      pair: two names of domains, such as cloth_sport.
      seed: of the draw.
      overwrite: whether an existing output is replaced.

    Returns:
      What data.json holds.
    """
    rows = _table(pathlib.Path(source) / "interactions.parquet")
    rows = rows.filter(pc.equal(pc.cast(rows["pair"], pa.string()), pair))
    names = pair.split("_")
    domain = pc.index_in(pc.cast(rows["domain"], pa.string()), pa.array(names)).to_numpy()
    if len(names) != 2 or not len(rows) or not np.isin((0, 1), domain).all():
        raise readers.DataError(
            f"{source}: `pair` should name two domains of its rows, such as cloth_sport. "
            f"Received: {pair!r}"
        )
    item = rows["item_id"].to_numpy().astype(np.int64)
    table = pa.table(
        {
            "user_id": rows["user_id"],
            "domain": pa.array(domain, pa.int8()),
            "item_id": pa.array(item + domain * (item[domain == 0].max() + 1)),
            "label": pa.array(np.ones(len(rows), np.int8)),
        }
    )
    split = pc.cast(rows["split"], pa.string())
    train, test = (table.filter(pc.equal(split, name)) for name in ("train", "test"))
    order = np.random.default_rng(seed).permutation(len(train))
    task = 2 * train["user_id"].to_numpy().astype(np.int64) + train["domain"].to_numpy()
    item = train["item_id"].to_numpy()
    is_valid = np.zeros(len(train), bool)
    is_valid[order[np.unique(task[order], return_index=True)[1]]] = True
    is_valid &= np.isin(item, item[~is_valid])
    known = train.take(order[~is_valid[order]])
    bought: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    for row in known.to_pylist():
        bought[row["user_id"], row["domain"]].append(row["item_id"])

    def with_bought(rows: pa.Table) -> pa.Table:
        pairs = [*zip(rows["user_id"].to_pylist(), rows["item_id"].to_pylist(), strict=True)]
        for place in (0, 1):
            lists = [[i for i in bought[user, place] if i != own] for user, own in pairs]
            values = pa.array([each[:HISTORY_LENGTH] for each in lists], pa.list_(pa.int64()))
            rows = rows.append_column(f"bought_{place}", values)
        return rows

    _, first = np.unique(item, return_index=True)
    parts = {
        "train": with_bought(train.filter(~is_valid)),
        "valid": with_bought(train.filter(is_valid)),
        "test": with_bought(test.filter(np.isin(test["item_id"].to_numpy(), item))),
        "items": train.select(["item_id", "domain"]).take(first),
    }
    return _write(output, f"amazon_cdr, {pair}", parts, overwrite)


def _films(table: pa.Table) -> pa.Table:
    """A row for each film of the table, by rising id."""
    _, first = np.unique(table["movie_id"].to_numpy(), return_index=True)
    return table.select(["movie_id", "first_genre", "genres", "year"]).take(first)


def _in_order(ratings: pa.Table, *, ties: bool) -> pa.Table:
    """Sorts ratings by time; with `ties`, a user's equal times by the order that is published."""
    order = np.argsort(ratings["timestamp"].to_numpy(), kind="stable")
    if ties and "seq_pos" in ratings.column_names:
        # A source whose times are partly estimated gives the order of a user's equal times apart.
        order = np.lexsort((ratings["seq_pos"].to_numpy(), ratings["timestamp"].to_numpy()))
    return ratings.take(order)


def _movielens_rows(tables: Tables, ratings: pa.Table, label: Any) -> pa.Table:
    """The ratings with the features of their users and films."""
    users = _rows_of(tables["users"], "user_id", ratings["user_id"])
    movies = _rows_of(tables["movies"], "movie_id", ratings["movie_id"])
    genres = pc.split_pattern(movies["genres"], "|").combine_chunks()
    return pa.table(
        {
            "user_id": ratings["user_id"],
            "movie_id": ratings["movie_id"],
            **{name: users[name] for name in ("gender", "age", "occupation", "zip_code")},
            "first_genre": pc.list_element(genres, 0),
            "genres": genres,
            "year": movies["year"],
            "label": label,
            "timestamp": ratings["timestamp"],
        }
    )


def movielens_1m_melu(
    source: readers.PathLike,
    output: readers.PathLike,
    *,
    support_history: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Makes MovieLens-1M's rows of MeLU's cold-start states: `label` is (rating - 1) / 4.

    Columns `at_least_2` to `at_least_5` say whether the rating is that much.

    Films have the features that MeLU's authors collected: rate, genres, directors and actors. A
    column `state` says whether user and film are known in training, `task` the user in the state.
    An epoch is chosen by training on `fit` and scoring `valid`, which are made of `train` alone.

    Args:
      source: folder with Parquet tables: ratings with a column melu_split, users, and movies_extra.
      output: folder to make.
      support_history: whether to add the columns of `history.add`, the training rows' histories
        of random lengths.
      overwrite: whether an existing output is replaced.

    Returns:
      What data.json holds.

    References: Lee et al. 2019; see `protocols.melu`.
    """
    folder = pathlib.Path(source)
    ratings = _table(folder / "ratings.parquet")
    if "melu_split" not in ratings.column_names:
        raise readers.DataError(
            f"{folder / 'ratings.parquet'}: no column `melu_split`, which tells MeLU's states. Add "
            "it from MeLU's published files."
        )
    users = _rows_of(_table(folder / "users.parquet"), "user_id", ratings["user_id"])
    # MeLU takes two films for aliases of others, and has no features of their own for them.
    ids = ratings["movie_id"].to_numpy()
    described = np.where(ids == 860, 811, np.where(ids == 1795, 1741, ids))
    movies = _rows_of(_table(folder / "movies_extra.parquet"), "movie_id", pa.array(described))

    def names(column: str) -> pa.ChunkedArray:
        found = pc.split_pattern(pc.cast(movies[column], pa.string()), ", ")
        return pc.fill_null(found, pa.scalar([], pa.list_(pa.string())))

    table = pa.table(
        {
            "user_id": ratings["user_id"],
            "movie_id": ratings["movie_id"],
            **{name: users[name] for name in ("gender", "age", "occupation", "zip_code")},
            "rate": movies["rate"],
            "genre": names("imdb_genres"),
            "director": names("director"),
            "actor": names("actors"),
            "rating": ratings["rating"],
            "label": pa.array((ratings["rating"].to_numpy() - 1) / 4, pa.float32()),
            **{
                f"at_least_{k}": pc.cast(pc.greater_equal(ratings["rating"], k), pa.int8())
                for k in range(2, 6)
            },
            "timestamp": ratings["timestamp"],
            "state": pc.cast(ratings["melu_split"], pa.string()),
        }
    )
    parts = protocols.melu(table, "user_id", "state", "timestamp")
    parts |= protocols.melu_within(parts["train"], "user_id", "movie_id")
    if support_history:
        parts = histories.add(
            parts,
            task="task",
            item="movie_id",
            label="label",
            rate=_MEAN_RATING,
            sizes=histories.RANDOM_SIZES,
        )
    return _write(output, "movielens_1m, melu split", parts, overwrite)


def _table(file: pathlib.Path) -> pa.Table:
    try:
        return pq.read_table(file)
    except FileNotFoundError:
        raise readers.DataError(
            f"{file}: no such file. `source` should be the folder that holds it."
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise readers.DataError(f"{file}: cannot be read as Parquet: {error}") from error


def _narrowed(table: pa.Table) -> pa.Table:
    """Stores whole numbers, also those kept as float for the sake of nulls, in the least type."""

    def narrow(values: pa.ChunkedArray) -> pa.ChunkedArray:
        if pa.types.is_list(values.type):
            return values.cast(pa.list_(pa.int16()))
        if pa.types.is_large_string(values.type):
            return values.cast(pa.string())
        for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64()):
            with contextlib.suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
                return values.cast(kind) if not pa.types.is_string(values.type) else values
        return values

    return pa.table({name: narrow(table[name]) for name in table.column_names})


def _filled(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Gives the publisher's nulls a value of their own."""
    return pc.fill_null(values, "unknown" if pa.types.is_string(values.type) else -1)


def _rows_of(table: pa.Table, key: str, wanted: pa.ChunkedArray) -> pa.Table:
    """For each wanted key, the row of `table` that has it.

    Raises:
      DataError: a key that the table lacks.
    """
    keys = table[key].to_numpy()
    order = np.argsort(keys, kind="stable")
    asked = wanted.to_numpy()
    place = np.searchsorted(keys, asked, sorter=order)
    rows = order[np.minimum(place, len(keys) - 1)]
    lacking = keys[rows] != asked
    if lacking.any():
        raise readers.DataError(
            f"`{key}` {asked[lacking][0]} is used, but its table has no such row. Complete the "
            "source."
        )
    return table.take(rows)


def _past(log: pa.Table, history: pa.Table) -> dict[str, Any]:
    """For each row of the log, which is sorted by time, what its user did before it."""
    columns = ("watched", "liked", "long_watched")
    lists: dict[str, dict[int, collections.deque[int]]] = {
        name: collections.defaultdict(lambda: collections.deque(maxlen=HISTORY_LENGTH))
        for name in columns
    }
    users = history["user_id"].to_pylist()
    for name in columns:
        for user, ids in zip(users, history[name].to_pylist(), strict=True):
            lists[name][user].extend(ids)
    total = collections.Counter(dict(zip(users, history["history_len"].to_pylist(), strict=True)))
    in_training: collections.Counter[int] = collections.Counter()
    # A user's rows of one time, which the user's later rows see and they themselves do not.
    pending: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
    pending_time: dict[int, int] = {}

    # A user's outcomes, which the user's rows of later days see. Not all dates agree with the
    # times, so the days do not follow each other strictly.
    outcomes: dict[int, list[tuple[int, int, bool, bool]]] = collections.defaultdict(list)

    names = ("user_id", "video_id", "time_ms", "date", "is_like", "long_view")
    rows = zip(*(log[name].to_pylist() for name in names), strict=True)
    past: dict[str, list[Any]] = {name: [] for name in (*columns, "num_history", "history_group")}
    for user, video, time, date, is_like, long_view in tqdm(
        rows, "histories", len(log), unit="row"
    ):
        if pending_time.get(user, time) < time:
            for earlier, day in pending.pop(user):
                lists["watched"][user].append(earlier)
                total[user] += 1
                in_training[user] += day <= LAST_TRAIN_DAY
        for day, earlier, was_liked, was_long in outcomes[user]:
            if day < date and was_liked:
                lists["liked"][user].append(earlier)
            if day < date and was_long:
                lists["long_watched"][user].append(earlier)
        outcomes[user] = [outcome for outcome in outcomes[user] if outcome[0] >= date]
        for name in columns:
            past[name].append([*lists[name][user]])
        past["num_history"].append(total[user])
        group = bisect.bisect((1, 6, 21), in_training[user])
        past["history_group"].append(_HISTORY_GROUPS[group])
        pending[user].append((video, date))
        pending_time[user] = time
        outcomes[user].append((date, video, bool(is_like), bool(long_view)))
    ids = pa.list_(pa.int16())
    return {
        **{name: pa.array(past[name], ids) for name in columns},
        "num_history": pa.array(past["num_history"], pa.int32()),
        "history_group": pa.array(past["history_group"]),
    }


def _user_rates(log: pa.Table, history: pa.Table) -> dict[str, Any]:
    """For each row of the log, the rates of its user over rows of earlier days."""
    ids, days = log["user_id"].to_numpy(), log["date"].to_numpy()
    everyone = np.concatenate([history["user_id"].to_numpy(), ids])
    users, codes = np.unique(everyone, return_inverse=True)
    before, here = codes[: len(history)], codes[len(history) :]
    pairs, in_tab = np.unique(
        ids.astype(np.int64) * 100 + log["tab"].to_numpy(), return_inverse=True
    )
    tabs = log["tab"].to_pylist()
    tab_rate = np.array([_TAB_CLICK_RATES.get(tab, _CLICK_RATE) for tab in tabs])
    one, click = np.ones(len(log)), log["is_click"].to_numpy()

    def earlier(values: Any, codes: Any, start: Any) -> Any:
        """Sums values over earlier days' rows of the same code, from each code's start."""
        total, found = start.copy(), np.empty(len(log))
        for day in np.unique(days):
            rows = days == day
            found[rows] = total[codes[rows]]
            total += np.bincount(codes[rows], values[rows], len(total))
        return found

    def rate(count: Any, rows: Any, prior: Any, weight: int) -> Any:
        return (count + weight * prior) / (rows + weight)

    none = np.zeros(len(users))
    views, long_views = none.copy(), none.copy()
    views[before] = history["recent_views"].to_numpy()
    long_views[before] = history["recent_long_views"].to_numpy()
    rows, clicks = earlier(one, here, none), earlier(click, here, none)
    views = earlier(one, here, views)
    long_views = earlier(log["long_view"].to_numpy(), here, long_views)
    none_in_tab = np.zeros(len(pairs))
    tab_rows = earlier(one, in_tab, none_in_tab)
    tab_clicks = earlier(click, in_tab, none_in_tab)
    columns = {
        "user_click_rate": rate(clicks, rows, _CLICK_RATE, _USER_ROWS),
        "user_click_lift": rate(clicks - earlier(tab_rate, here, none), rows, 0.0, _USER_ROWS),
        "user_long_view_rate": rate(long_views, views, _LONG_VIEW_RATE, _USER_ROWS),
        "user_tab_click_rate": rate(tab_clicks, tab_rows, tab_rate, _USER_TAB_ROWS),
        "log_user_rows": np.log1p(rows),
    }
    return {name: values.astype(np.float32) for name, values in columns.items()}


def _movielens_tables(source: pathlib.Path) -> Tables:
    names = ("ratings", "users", "movies")
    if not (source / "ratings.dat").exists():
        return {name: _table(source / f"{name}.parquet") for name in names}
    ratings, users, movies = (_double_colons(source / f"{name}.dat") for name in names)
    integers = {
        "ratings": dict(zip(("user_id", "movie_id", "rating", "timestamp"), ratings, strict=True)),
        "users": {"user_id": users[0], "age": users[2], "occupation": users[3]},
        # A title ends in its year: "Toy Story (1995)".
        "movies": {"movie_id": movies[0], "year": [title[-5:-1] for title in movies[1]]},
    }
    strings = {
        "ratings": {},
        "users": {"gender": users[1], "zip_code": users[4]},
        "movies": {"genres": movies[2]},
    }
    return {
        name: pa.table({c: pa.array(v).cast(pa.int64()) for c, v in integers[name].items()} | more)
        for name, more in strings.items()
    }


def _double_colons(file: pathlib.Path) -> list[list[str]]:
    """Columns of a file whose fields are separated by two colons."""
    rows: list[list[str]] = []
    with file.open(encoding="latin-1") as lines:
        for number, line in enumerate(tqdm(lines, file.name, unit="line")):
            fields = line.rstrip("\n").split("::")
            if rows and len(fields) != len(rows[0]):
                raise readers.DataError(
                    f"{file}, row {number} (counted from 0): should have {len(rows[0])} fields. "
                    f"Received: {len(fields)}. Download it again."
                )
            rows.append(fields)
    if not rows:
        raise readers.DataError(f"{file}: no rows. Download it again.")
    return [list(column) for column in zip(*rows, strict=True)]


@contextlib.contextmanager
def _new_folder(output: pathlib.Path, overwrite: bool) -> Iterator[pathlib.Path]:
    """A folder beside `output` that takes its name when it is whole.

    Raises:
      ValueError: the output exists and is not to be replaced.
    """
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists. Give another output, or --overwrite to replace it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    unfinished.mkdir()
    try:
        yield unfinished
        if output.exists():
            old = output.with_name(f".{output.name}.{os.getpid()}.old")
            output.rename(old)
            unfinished.rename(output)
            shutil.rmtree(old)
        else:
            unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _write(
    output: readers.PathLike,
    dataset: str,
    tables: Tables,
    overwrite: bool,
    notices: Iterable[pathlib.Path] = (),
    compression_level: int = 3,
) -> dict[str, Any]:
    """Writes the tables, what they are, and the notices that must travel with them."""
    target = pathlib.Path(os.path.abspath(output))
    with _new_folder(target, overwrite) as folder:
        for name, table in tqdm(tables.items(), "files", unit="file"):
            pq.write_table(
                table,
                folder / f"{name}.parquet",
                compression="zstd",
                compression_level=compression_level,
                row_group_size=_ROW_GROUP,
                write_page_checksum=True,
            )
        about = {
            "dataset": dataset,
            "rows": {name: len(table) for name, table in tables.items()},
            "sha256": {name: readers.sha256(folder / f"{name}.parquet") for name in tables},
        }
        (folder / "data.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        for notice in notices:
            shutil.copyfile(notice, folder / notice.name)
    return about


def define_flags() -> None:
    """Defines this program's flags."""
    flags.DEFINE_enum("dataset", None, DATASETS, "The data set to prepare.", required=True)
    flags.DEFINE_string("source", None, "Folder of the published tables; kuairand needs none.")
    flags.DEFINE_string("output", None, "Folder to make.", required=True)
    flags.DEFINE_enum("split", "time", SPLITS, "How movielens_1m is split.")
    flags.DEFINE_string("pair", "cloth_sport", "The domains of amazon_cdr.")
    flags.DEFINE_integer("seed", 0, "Of random draws.", lower_bound=0)
    flags.DEFINE_bool("support_history", False, "Add columns of what each user's support rows say.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing output.")


def run(_: list[str]) -> None:
    """Prepares the data set that the flags name."""
    values = flags.FLAGS
    source, output, overwrite = values.source, values.output, values.overwrite
    try:
        if values.dataset == "kuairand":
            about = kuairand(
                source, output, support_history=values.support_history, overwrite=overwrite
            )
        elif source is None:
            raise ValueError(f"--dataset={values.dataset} needs --source; see --help.")
        elif values.dataset == "kuairand_sample":
            about = kuairand_sample(source, output, overwrite=overwrite)
        elif values.dataset == "amazon_cdr":
            about = amazon_cdr(
                source, output, pair=values.pair, seed=values.seed, overwrite=overwrite
            )
        else:
            about = movielens_1m(
                source,
                output,
                split=values.split,
                seed=values.seed,
                support_history=values.support_history,
                overwrite=overwrite,
            )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for name, rows in about["rows"].items():
        print(f"{output}/{name}.parquet: {rows:,} rows, sha256 {about['sha256'][name]}")


def main() -> None:
    """Entry of `qianmo-prepare`."""
    program.start(define_flags, run)


if __name__ == "__main__":
    main()
