"""MovieLens-1M: a million ratings of films, and the ways to split them."""

from __future__ import annotations

import pathlib
import re
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from qianmo.pipelines.data import readers
from qianmo.pipelines.datasets import history as histories
from qianmo.pipelines.datasets import protocols
from qianmo.pipelines.datasets.tables import Tables, read_table, rows_of, write

HISTORY_LENGTH = 20


Split = Literal[
    "time", "random", "ages", "new_users", "all_users", "new_items", "next_item", "melu"
]


SPLITS: tuple[Split, ...] = get_args(Split)


_AGES = (25, 35)  # where MovieLens-1M's domains end


# Of MovieLens-1M: the share of likes, and the mean of (rating - 1) / 4.
_LIKE_RATE, _MEAN_RATING = 0.78, 0.65


def movielens_1m(
    source: readers.PathLike,
    output: readers.PathLike,
    *,
    split: Split = "time",
    seed: int = 0,
    ties: protocols.Ties = "excluded",
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
        rows; both with the 20 rows before as test_support, and with 10 % more for valid and
        valid_support, see `protocols`. "new_items" trains on
        films with 650 rows or more and tests on others, see `protocols.new_items`. "next_item" and
        "melu": other rows, see `movielens_1m_next_item` and `movielens_1m_melu`.
      seed: of the random splits, and of the draw of new users.
      ties: whether a user's ratings of one second are known to each other, in the published order
        of the rows; for histories and support.
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
            source, output, ties=ties, support_history=support_history, overwrite=overwrite
        )
    if split == "next_item":
        return movielens_1m_next_item(source, output, ties=ties, overwrite=overwrite)
    tables = _movielens_tables(pathlib.Path(source))
    ratings = tables["ratings"]
    left_out = {}
    if split != "ages":
        neither = pc.equal(ratings["rating"], 3)
        left_out["of rating 3, which is neither a like nor a dislike"] = pc.sum(neither).as_py()
        ratings = ratings.filter(pc.invert(neither))
    ratings = _in_order(ratings, within_seconds=split in ("new_users", "all_users"))
    is_liked = pc.cast(pc.greater_equal(ratings["rating"], 4), pa.int8())
    table = _movielens_rows(tables, ratings, is_liked)
    count = len(table)
    train = int(0.8 * count)
    if split == "time":
        parts = {"train": table.slice(0, train), "test": table.slice(train)}
    elif split == "new_users":
        parts = protocols.new_users(table, "user_id", "timestamp", seed=seed, ties=ties)
    elif split == "all_users":
        parts = protocols.all_users(table, "user_id", "timestamp", ties=ties)
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
    if split == "new_users":
        used = sum(map(len, parts.values()))
        reason = "of held-out users, too few to score or of the second of the first row to score"
        left_out[reason] = count - used
    elif split == "new_items":
        used = sum(len(rows) for name, rows in parts.items() if name != "items")
        left_out["of films with too few rows"] = count - used
    if support_history:
        parts = histories.add(
            parts,
            task="user_id",
            item="movie_id",
            label="label",
            time="timestamp",
            rate=_LIKE_RATE,
            sizes=histories.RANDOM_SIZES if split == "new_users" else (protocols.SUPPORT_ROWS,),
            ties=ties,
        )
    return write(output, f"movielens_1m, {split} split", parts, overwrite, left_out=left_out)


def movielens_1m_next_item(
    source: readers.PathLike,
    output: readers.PathLike,
    *,
    ties: protocols.Ties = "excluded",
    overwrite: bool = False,
) -> dict[str, Any]:
    """Makes MovieLens-1M's rows for retrieval: one a rating, whatever it is; `label` is 1.

    `watched` holds the user's last 20 films before the row, oldest first. Of each user the last row
    is in test and the last but one in valid, see `protocols.next_items`; items.parquet has a row
    for each film that anyone rated.

    Args:
      source: folder as for `movielens_1m`.
      output: folder to make.
      ties: "by_row" is the protocol of published results, in which a film is known that was rated
        in the same second, where the published order has it first.
      overwrite: whether an existing output is replaced.

    Returns:
      What data.json holds.
    """
    tables = _movielens_tables(pathlib.Path(source))
    ratings = _in_order(tables["ratings"], within_seconds=True)
    table = _movielens_rows(tables, ratings, pa.array(np.ones(len(ratings), np.int8)))
    table = histories.last_items(
        table,
        task="user_id",
        item="movie_id",
        time="timestamp",
        rows=HISTORY_LENGTH,
        name="watched",
        ties=ties,
    )
    parts = protocols.next_items(table, "user_id", "timestamp", ties=ties)
    parts["items"] = _films(table)
    return write(output, "movielens_1m, next_item split", parts, overwrite)


def movielens_1m_melu(
    source: readers.PathLike,
    output: readers.PathLike,
    *,
    ties: protocols.Ties = "excluded",
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
      ties: as for `movielens_1m`, of the histories of training rows. Support is drawn at random,
        as the protocol has it, and may be younger than the rows to be scored.
      support_history: whether to add the columns of `history.add`, the training rows' histories
        of random lengths.
      overwrite: whether an existing output is replaced.

    Returns:
      What data.json holds.

    References: Lee et al. 2019; see `protocols.melu`.
    """
    folder = pathlib.Path(source)
    ratings = read_table(folder / "ratings.parquet")
    if "melu_split" not in ratings.column_names:
        raise readers.DataError(
            f"{folder / 'ratings.parquet'}: no column `melu_split`, which tells MeLU's states. Add "
            "it from MeLU's published files."
        )
    users = rows_of(read_table(folder / "users.parquet"), "user_id", ratings["user_id"])
    # MeLU takes two films for aliases of others, and has no features of their own for them.
    ids = ratings["movie_id"].to_numpy()
    described = np.where(ids == 860, 811, np.where(ids == 1795, 1741, ids))
    movies = rows_of(read_table(folder / "movies_extra.parquet"), "movie_id", pa.array(described))

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
    used = len(parts["test"]) + len(parts["test_support"])
    left_out = {"of users with fewer than 13 or more than 100 in a state": len(table) - used}
    parts |= protocols.melu_within(parts["train"], "user_id", "movie_id")
    if support_history:
        parts = histories.add(
            parts,
            task="task",
            item="movie_id",
            label="label",
            time="timestamp",
            rate=_MEAN_RATING,
            sizes=histories.RANDOM_SIZES,
            ties=ties,
        )
    return write(output, "movielens_1m, melu split", parts, overwrite, left_out=left_out)


def _films(table: pa.Table) -> pa.Table:
    """A row for each film of the table, by rising id."""
    _, first = np.unique(table["movie_id"].to_numpy(), return_index=True)
    return table.select(["movie_id", "first_genre", "genres", "year"]).take(first)


def _in_order(ratings: pa.Table, *, within_seconds: bool) -> pa.Table:
    """Sorts ratings by time, and a user's equal times by the order that is published, if asked."""
    order = np.argsort(ratings["timestamp"].to_numpy(), kind="stable")
    if within_seconds and "seq_pos" in ratings.column_names:
        # A source whose times are partly estimated gives the order of a user's equal times apart.
        order = np.lexsort((ratings["seq_pos"].to_numpy(), ratings["timestamp"].to_numpy()))
    return ratings.take(order)


def _movielens_rows(tables: Tables, ratings: pa.Table, label: Any) -> pa.Table:
    """The ratings with the features of their users and films."""
    users = rows_of(tables["users"], "user_id", ratings["user_id"])
    movies = rows_of(tables["movies"], "movie_id", ratings["movie_id"])
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


def _movielens_tables(source: pathlib.Path) -> Tables:
    names = ("ratings", "users", "movies")
    if not (source / "ratings.dat").exists():
        return {name: read_table(source / f"{name}.parquet") for name in names}
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
        name: pa.table(
            {column: _integers(source / f"{name}.dat", column, values) for column, values in own}
            | strings[name]
        )
        for name, own in ((name, integers[name].items()) for name in names)
    }


def _integers(file: pathlib.Path, column: str, values: list[str]) -> pa.Array:
    try:
        return pa.array(values).cast(pa.int64())
    except pa.ArrowInvalid:
        row = next(row for row, value in enumerate(values) if not re.fullmatch(r"-?\d+", value))
        raise readers.DataError(
            f"{file}, row {row} (counted from 0): `{column}` should be a whole number. "
            f"Received: {values[row]!r}. Download it again."
        ) from None


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
