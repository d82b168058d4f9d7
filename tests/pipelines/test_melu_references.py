"""The reference models of MeLU's states: against a transcription row by row, and as published."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qianmo.pipelines.datasets import movielens_1m

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture
def references(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not (ROOT / "benchmarks").exists():
        pytest.skip("an installed package has no benchmarks")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import melu_references

    return melu_references


@pytest.fixture(scope="module")
def small() -> tuple[pa.Table, pa.Table, pa.Table]:
    """Six known users and two new ones; films 0 to 8 known, 9 to 11 new; some lists are empty."""
    random = np.random.default_rng(8)
    films = [
        {
            "movie_id": film,
            "rate": random.choice(["G", "R"]),
            "genre": list(random.choice(["Drama", "Crime", "War"], random.integers(4), False)),
            "director": [f"d{random.integers(3)}"] * int(film != 4),
            "actor": list(random.choice([f"a{i}" for i in range(6)], random.integers(4), False)),
        }
        for film in range(12)
    ]

    def rows(users: range, choice: range, count: int) -> pa.Table:
        found = []
        for user in users:
            for film in random.choice(choice, count, replace=False):
                person = {"gender": "FM"[user % 2], "age": user % 3, "occupation": user % 4}
                rating = int(random.integers(1, 6))
                found.append(
                    {**films[film], "user_id": user, "task": user, "rating": rating, **person}
                )
        return pa.Table.from_pylist(found)

    train = rows(range(6), range(9), 5)
    support = pa.concat_tables([train, rows(range(6, 7), range(12), 6)])
    return train, support, rows(range(8), range(12), 3)


def test_two_means_row_by_row(references: Any, small: tuple[pa.Table, pa.Table, pa.Table]) -> None:
    train, support, test = (part.to_pylist() for part in small)
    mean = np.mean([row["rating"] for row in train])

    def film_mean(film: int) -> float:
        own = [row["rating"] - mean for row in train if row["movie_id"] == film]
        return float(mean + sum(own) / (len(own) + 10))

    expected = []
    for row in test:
        own = [r for r in support if r["user_id"] == row["user_id"]]
        residual = sum(r["rating"] - film_mean(r["movie_id"]) for r in own) / (len(own) + 5)
        expected.append(film_mean(row["movie_id"]) + residual)
    np.testing.assert_allclose(references.two_means(*small), expected, rtol=1e-12)


def test_kernel_ridge_by_dense_algebra(
    references: Any, small: tuple[pa.Table, pa.Table, pa.Table]
) -> None:
    train, support, test = (part.to_pylist() for part in small)
    mean = np.mean([row["rating"] for row in train])
    noise = references.NOISE

    def overlap(one: dict[str, Any], other: dict[str, Any], name: str) -> float:
        a, b = (v if isinstance(v, list) else [v] for v in (one[name], other[name]))
        return len({*a} & {*b}) / np.sqrt(len(a) * len(b)) if a and b else 0.0

    def covariance(ones: Any, others: Any, variances: dict[str, float], level: float = 0.0) -> Any:
        return level + np.array(
            [
                [sum(v * overlap(a, b, n) for n, v in variances.items()) for b in others]
                for a in ones
            ]
        )

    # What the effects predict without the user's own: a Gaussian process in the dual.
    shared = {n: v for n, v in references.EFFECTS.items() if n != "user_id"}
    inverse = np.linalg.inv(
        covariance(train, train, references.EFFECTS) + noise * np.eye(len(train))
    )
    weights = inverse @ (np.array([row["rating"] for row in train]) - mean)
    expected = []
    for row in test:
        base, own = (covariance([row], train, shared) @ weights + mean)[0], []
        own = [r for r in support if r["user_id"] == row["user_id"]]
        if own:
            residual = [r["rating"] for r in own] - covariance(own, train, shared) @ weights - mean
            rows = [sum(r["movie_id"] == o["movie_id"] for r in train) for o in own]
            unknown = [1 / (1 / references.EFFECTS["movie_id"] + n / noise) for n in rows]
            kernel = covariance(own, own, references.TASTES, references.LEVEL)
            cross = covariance([row], own, references.TASTES, references.LEVEL)
            base += (
                cross @ np.linalg.solve(kernel + np.diag(noise + np.array(unknown)), residual)
            )[0]
        expected.append(base)
    np.testing.assert_allclose(references.kernel_ridge(*small), expected, atol=1e-5)


@pytest.mark.skipif(
    "QIANMO_MOVIELENS_1M" not in os.environ,
    reason="QIANMO_MOVIELENS_1M: folder of ml-1m, which may not be shipped",
)
def test_the_four_states(references: Any, tmp_path: pathlib.Path) -> None:
    source = pathlib.Path(os.environ["QIANMO_MOVIELENS_1M"])
    if not (source / "ratings.parquet").exists():
        pytest.skip("MeLU's states are in the Parquet tables alone")
    movielens_1m.movielens_1m(source, tmp_path / "melu", split="melu")
    names = ("train", "test_support", "test")
    parts = [pq.read_table(tmp_path / "melu" / f"{name}.parquet") for name in names]
    for model, published in (
        (references.two_means, (0.7415, 0.7425, 0.8867, 0.8745)),
        (references.kernel_ridge, (0.7225, 0.7212, 0.8666, 0.8642)),
    ):
        found = references.errors(model(*parts), parts[2])
        assert [len(e) for e in found.values()] == [2653, 668, 2863, 723]
        means = [float(e.mean()) for e in found.values()]
        assert means == pytest.approx(published, abs=1e-4)
