"""KuaiRand-Pure: impressions of short videos on Kuaishou, 25 April to 5 May 2022."""

from __future__ import annotations

import bisect
import collections
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from qianmo.pipelines.data import readers
from qianmo.pipelines.datasets import history as histories
from qianmo.pipelines.datasets import protocols
from qianmo.pipelines.datasets.tables import filled, narrowed, read_table, rows_of, write

SAMPLE = pathlib.Path(__file__).resolve().parents[1] / "sample"


HISTORY_LENGTH = 20


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
_USER_ROWS, _USER_TAB_ROWS = 5, 3


_LEAST_TAB_ROWS = 1000  # in the training days, of a tab with a rate of its own


class _Priors(NamedTuple):
    """Rates of the training days, to two digits: of clicks, of long views, of clicks by tab."""

    click: float
    long_view: float
    tab_click: Mapping[int, float]


def _priors(log: pa.Table, train_until: int) -> _Priors:
    train = log.filter(log["date"].to_numpy() <= train_until)
    click, tab = train["is_click"].to_numpy(), train["tab"].to_numpy()
    tabs, rows = np.unique(tab, return_counts=True)
    common = tabs[rows >= _LEAST_TAB_ROWS].tolist()
    return _Priors(
        round(float(click.mean()), 2),
        round(float(train["long_view"].to_numpy().mean()), 2),
        {t: round(float(click[tab == t].mean()), 2) for t in common},
    )


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
    log = read_table(folder / "interactions.parquet")
    keys, rows_before = log.column_names, len(log)
    first = log.append_column("row", pa.array(np.arange(len(log)))).group_by(keys)
    rows = first.aggregate([("row", "min")])["row_min"].to_numpy()
    log = log.take(np.sort(rows)).select(_LOG_COLUMNS)

    users = read_table(folder / "users.parquet").select(["user_id", *_USER_COLUMNS])
    videos = read_table(folder / "videos_basic.parquet").select(["video_id", *_VIDEO_COLUMNS])
    history = read_table(folder / "user_history_before_20220425.parquet")
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
    tables = {name: narrowed(table) for name, table in tables.items()}
    notices = [file for file in (SAMPLE / "ATTRIBUTION.md", SAMPLE / "LICENSE") if file.exists()]
    left_out = {"that are exact duplicates of others": rows_before - len(log)}
    return write(output, "kuairand_sample", tables, overwrite, notices, 19, left_out)


def kuairand(
    source: readers.PathLike | None,
    output: readers.PathLike,
    *,
    train_until: int = 20220503,
    valid_day: int = 20220504,
    test_day: int = 20220505,
    support_history: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Makes KuaiRand's rows: one an impression, features known before it, and its outcomes.

    `watched` holds the user's last 20 videos, oldest first: those of the days before the log, then
    those of the log's rows with an earlier time. Rows of the same time do not see each other.

    Outcomes of a row (clicks, long views, likes) are labels of its own day and become features on
    the next: `liked`, `long_watched` and the users' rates hold rows of earlier days alone, so no
    label of a day is in any feature of that day. A rate is (k + w r) / (n + w): k of n rows had the
    outcome, r is the training days' rate to two digits, w is 5 rows, or 3 for a user's rows of one
    tab. Long views are counted in the published histories too, clicks in the log only. Tabs differ
    in what a click is, so a lift counts clicks above the rate that the row's tab had in training,
    where it has 1,000 rows; else above that of all.

    `valid_support` and `test_support` hold the last 20 impressions of each user before the day.

    Args:
      source: folder made by `kuairand_sample`; None takes the shipped one.
      output: folder to make.
      train_until: the last training day, as in 20220503.
      valid_day: the validation day, after it.
      test_day: the test day, after that. Rows of other days are left out.
      support_history: whether to add the columns of `history.add` for clicks, from the last 20
        rows of earlier days.
      overwrite: whether an existing output is replaced.

    Returns:
      What data.json holds.

    Raises:
      ValueError: days out of order.
      DataError: a source that is not whole, or has no rows of a day.
    """
    if not train_until < valid_day < test_day:
        raise ValueError(
            "`train_until`, `valid_day` and `test_day` should follow each other. Received: "
            f"{train_until}, {valid_day}, {test_day}"
        )
    folder = pathlib.Path(source or SAMPLE)
    log = read_table(folder / "interactions.parquet")
    date = log["date"].to_numpy()
    days = {"train_until": date <= train_until, "valid_day": date == valid_day}
    for name, own in (*days.items(), ("test_day", date == test_day)):
        if not own.any():
            raise readers.DataError(
                f"{folder}: no rows for `{name}`; its days are {date.min()} to {date.max()}."
            )
    log = log.take(np.argsort(log["time_ms"].to_numpy(), kind="stable"))
    users = rows_of(read_table(folder / "users.parquet"), "user_id", log["user_id"])
    videos = rows_of(read_table(folder / "videos.parquet"), "video_id", log["video_id"])
    history = read_table(folder / "history.parquet")
    past = _past(log, history, train_until)
    priors = _priors(log, train_until)

    tags = (
        pc.split_pattern(filled(videos["tag"], "-1"), ",")
        .combine_chunks()
        .cast(pa.list_(pa.int64()))
    )
    seconds = log["duration_ms"].to_numpy() / 1000
    bucket = np.where(seconds > 0, np.searchsorted(_DURATION_SECONDS, seconds, "right"), -1)
    columns: dict[str, Any] = {
        "user_id": log["user_id"],
        "video_id": log["video_id"],
        "tab": log["tab"],
        "hour": pc.divide(log["hourmin"], 100),
        **{name: filled(users[name]) for name in _USER_COLUMNS},
        **{name: filled(videos[name]) for name in _VIDEO_COLUMNS if name != "tag"},
        "tag": pc.list_element(tags, 0),
        "tags": tags,
        "duration_bucket": bucket.astype(np.int8),
        "log_duration": np.log1p(seconds).astype(np.float32),
        **past,
        "log_num_history": np.log1p(past["num_history"]).astype(np.float32),
        **_user_rates(log, history, priors),
        **{name: log[name] for name in _LABELS},
        "time_ms": log["time_ms"],
        "date": log["date"],
    }
    table = pa.table(columns)
    date = log["date"].to_numpy()
    parts = {
        "train": table.filter(date <= train_until),
        "valid": table.filter(date == valid_day),
        "test": table.filter(date == test_day),
    }
    others = (date > train_until) & ~np.isin(date, (valid_day, test_day))
    left_out = {
        f"of days after {test_day}": int((others & (date > test_day)).sum()),
        "of days between the parts": int((others & (date < test_day)).sum()),
    }
    for part, day in (("valid", valid_day), ("test", test_day)):
        parts[f"{part}_support"] = protocols.support_before(
            table.filter(date < day), parts[part], "user_id", "time_ms"
        )
    if support_history:
        parts = histories.add(
            parts,
            task="user_id",
            item="video_id",
            label="is_click",
            time="date",
            rate=priors.click,
        )
    notices = [folder / name for name in ("ATTRIBUTION.md", "LICENSE")]
    notices = [notice for notice in notices if notice.exists()]
    return write(output, "kuairand", parts, overwrite, notices, left_out=left_out)


def _past(log: pa.Table, history: pa.Table, train_until: int) -> dict[str, Any]:
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
                in_training[user] += day <= train_until
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


def _user_rates(log: pa.Table, history: pa.Table, priors: _Priors) -> dict[str, Any]:
    """For each row of the log, the rates of its user over rows of earlier days."""
    ids, days = log["user_id"].to_numpy(), log["date"].to_numpy()
    everyone = np.concatenate([history["user_id"].to_numpy(), ids])
    users, codes = np.unique(everyone, return_inverse=True)
    before, here = codes[: len(history)], codes[len(history) :]
    pairs, in_tab = np.unique(
        ids.astype(np.int64) * 100 + log["tab"].to_numpy(), return_inverse=True
    )
    tabs = log["tab"].to_pylist()
    tab_rate = np.array([priors.tab_click.get(tab, priors.click) for tab in tabs])
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
        "user_click_rate": rate(clicks, rows, priors.click, _USER_ROWS),
        "user_click_lift": rate(clicks - earlier(tab_rate, here, none), rows, 0.0, _USER_ROWS),
        "user_long_view_rate": rate(long_views, views, priors.long_view, _USER_ROWS),
        "user_tab_click_rate": rate(tab_clicks, tab_rows, tab_rate, _USER_TAB_ROWS),
        "log_user_rows": np.log1p(rows),
    }
    return {name: values.astype(np.float32) for name, values in columns.items()}
