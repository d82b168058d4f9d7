"""Reference models for MeLU's four states, in NumPy: what a meta-learner should beat.

    python benchmarks/melu_references.py FOLDER

FOLDER is made by `qianmo-prepare --dataset=movielens_1m --split=melu`. Both references are fitted
on its train part and adapt to a user by the user's support; both predict ratings of 1 to 5.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qianmo.pipelines.datasets.protocols import STATES

Floats = npt.NDArray[np.float64]

FILM_ROWS, USER_ROWS = 10, 5
# Variances of the effects and of the noise, in rating points squared: set by hand within the train
# part, with a quarter of its films and a fifth of its users held out. Halving or doubling any of
# them changes the mean absolute error there by less than .005.
EFFECTS = {
    "movie_id": 0.1,
    "rate": 0.02,
    "genre": 0.03,
    "director": 0.05,
    "actor": 0.05,
    "gender": 0.004,
    "age": 0.004,
    "occupation": 0.004,
    "user_id": 0.2,
}
TASTES = {"genre": 0.15, "director": 0.1, "actor": 0.1, "rate": 0.03}
LEVEL, NOISE = 0.25, 0.7


def two_means(train: pa.Table, support: pa.Table, test: pa.Table) -> Floats:
    """Mean of the film and mean residual of the user, both shrunk.

    b_i  = mu + sum_train(r - mu) / (n_i + 10)
    r_ui = b_i + sum_support(r - b) / (n_u + 5)
    """
    films = 1 + max(int(pc.max(part["movie_id"]).as_py()) for part in (train, support, test))
    rating = _ratings(train)
    film, mean = train["movie_id"].to_numpy(), rating.mean()
    count = np.bincount(film, minlength=films)
    film_mean = mean + np.bincount(film, rating - mean, films) / (count + FILM_ROWS)
    tasks = 1 + max(int(pc.max(part["task"]).as_py()) for part in (support, test))
    residual = _ratings(support) - film_mean[support["movie_id"].to_numpy()]
    task = support["task"].to_numpy()
    count = np.bincount(task, minlength=tasks)
    user = np.bincount(task, residual, tasks) / (count + USER_ROWS)
    return np.asarray(film_mean[test["movie_id"].to_numpy()] + user[test["task"].to_numpy()])


def kernel_ridge(train: pa.Table, support: pa.Table, test: pa.Table) -> Floats:
    """Ridge regression on ids and attributes, and for each user a kernel ridge on its residuals.

      r_ui = mu + sum_g x_g w_g + f_u(i) + e,    w_g ~ N(0, EFFECTS[g]),    e ~ N(0, NOISE)
      cov(f_u(i), f_u(j)) = LEVEL + sum_g TASTES[g] x_g(i) x_g(j)

    x_g marks the values of column g, each by 1 / sqrt(how many the row has). All w are fitted
    together on train, an effect for each user among them, which is then left out: f_u takes its
    place, fitted on the user's support. There the noise of a row is NOISE and what is still unknown
    of its film's effect.
    """
    parts = (train, support, test)
    whole = pa.concat_tables(part.select([*EFFECTS, "task", "rating"]) for part in parts)
    cuts = np.cumsum([len(part) for part in parts])
    marks = {name: _marks(whole[name]) for name in EFFECTS}
    mean, effects = _ridge(marks, _ratings(train))
    base = np.full(len(whole), mean)
    for name, (ids, x) in marks.items():
        if name != "user_id":
            base += (effects[name][ids] * x).sum(1)

    film = marks["movie_id"][0][:, 0]
    kernel = _taste_kernel(marks, film)
    count = np.bincount(film[: cuts[0]], minlength=len(kernel))
    noise = NOISE + 1 / (1 / EFFECTS["movie_id"] + count / NOISE)

    task, residual = whole["task"].to_numpy(), _ratings(whole) - base
    known, asked = np.arange(cuts[0], cuts[1]), np.arange(cuts[1], cuts[2])
    own = dict(_by_task(known, task))
    predicted = base[asked]
    for one, rows in _by_task(asked, task):
        if one in own:
            seen = film[own[one]]
            covariance = kernel[np.ix_(seen, seen)] + np.diag(noise[seen])
            weights = np.linalg.solve(covariance, residual[own[one]])
            predicted[rows - cuts[1]] += kernel[np.ix_(film[rows], seen)] @ weights
    return predicted


def errors(predicted: Floats, test: pa.Table) -> dict[str, Floats]:
    """Mean absolute error of each user in each state, by rising `task`; to compare in pairs."""
    _, state, inverse = np.unique(test["task"].to_numpy(), return_index=True, return_inverse=True)
    absolute = np.abs(predicted - _ratings(test))
    by_task = np.bincount(inverse, absolute) / np.bincount(inverse)
    states = test["state"].to_numpy()[state]
    return {name: by_task[states == name] for name in STATES}


def _ratings(table: pa.Table) -> Floats:
    return np.asarray(table["rating"].to_numpy(), np.float64)


def _marks(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], Floats]:
    """Numbers of a column's values [n, L] and their x [n, L], 0 where a list has ended."""
    column = column.combine_chunks()
    if not pa.types.is_list(column.type):
        ids = column.dictionary_encode().indices.to_numpy().astype(np.int64)
        return ids[:, None], np.ones((len(ids), 1))
    lengths = pc.list_value_length(column).to_numpy()
    there = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(there.shape, np.int64)
    ids[there] = pc.list_flatten(column).dictionary_encode().indices.to_numpy()
    return ids, there / np.sqrt(np.maximum(lengths, 1))[:, None]


def _ridge(marks: Mapping[str, Any], rating: Floats) -> tuple[float, dict[str, Floats]]:
    """Minimises |r - mu - X w|^2 / NOISE + sum_g |w_g|^2 / EFFECTS[g] by conjugate gradients.

    X are the first rows of the marks, as many as there are ratings.
    """
    count = len(rating)
    scaled = [(ids[:count], np.sqrt(EFFECTS[name]) * x[:count]) for name, (ids, x) in marks.items()]
    sizes = [int(ids.max()) + 1 for ids, _ in marks.values()]
    starts = np.cumsum([0, *sizes])

    def forward(z: Floats) -> Floats:
        pairs = zip(scaled, starts[:-1], strict=True)
        return np.sum([(z[start + ids] * x).sum(1) for (ids, x), start in pairs], axis=0)

    def backward(rows: Floats) -> Floats:
        return np.concatenate(
            [
                np.bincount(ids.ravel(), (rows[:, None] * x).ravel(), size)
                for (ids, x), size in zip(scaled, sizes, strict=True)
            ]
        )

    mean = float(rating.mean())
    rest = backward(rating - mean)
    z, direction, square = np.zeros_like(rest), rest, rest @ rest
    enough = 1e-14 * square
    while square > enough:
        image = backward(forward(direction)) + NOISE * direction
        step = square / (direction @ image)
        z, rest = z + step * direction, rest - step * image
        last, square = square, rest @ rest
        direction = rest + square / last * direction
    parts = np.split(z, starts[1:-1])
    return mean, {
        name: np.sqrt(EFFECTS[name]) * part for name, part in zip(marks, parts, strict=True)
    }


def _taste_kernel(marks: Mapping[str, Any], film: npt.NDArray[np.int64]) -> Floats:
    """Covariance of one user's f between all films."""
    films, row = np.unique(film, return_index=True)
    kernel = np.full((len(films), len(films)), LEVEL)
    for name, variance in TASTES.items():
        ids, x = marks[name]
        features = np.zeros((len(films), ids.max() + 1))
        np.add.at(features, (films[:, None], ids[row]), x[row])
        kernel += variance * (features @ features.T)
    return kernel


def _by_task(rows: npt.NDArray[np.int64], task: npt.NDArray[np.int64]) -> Any:
    """Pairs of a task and those of the rows that have it."""
    rows = rows[np.argsort(task[rows], kind="stable")]
    for group in np.split(rows, np.flatnonzero(np.diff(task[rows])) + 1):
        yield int(task[group[0]]), group


def main() -> None:
    """Prints the mean absolute error of each reference in each state."""
    folder = pathlib.Path(sys.argv[1])
    names = ("train", "test_support", "test")
    train, support, test = (pq.read_table(folder / f"{name}.parquet") for name in names)
    for model in (two_means, kernel_ridge):
        found = errors(model(train, support, test), test)
        print(f"{model.__name__:14}", *(f"{s} {e.mean():.4f}" for s, e in found.items()))


if __name__ == "__main__":
    main()
