"""What is counted from the training rows, against counts by hand."""

from __future__ import annotations

import collections
import json
import pathlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from qianmo.layers.encode import Encode
from qianmo.layers.features import Dense
from qianmo.layers.schema import Schema
from qianmo.pipelines.data import readers, statistics


def schema_of(*features: dict[str, Any]) -> Schema:
    return Schema.from_config({"features": features, "labels": ["y"]})


def write(folder: pathlib.Path, row_group_size: int = 100, **columns: Any) -> pathlib.Path:
    rows = len(next(iter(columns.values())))
    table = pa.table({**columns, "y": np.zeros(rows, np.int8)})
    pq.write_table(table, folder / "a.parquet", row_group_size=row_group_size)
    return folder / "a.parquet"


def test_a_vocabulary_is_ordered_by_count_then_value(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, a=[3, 9, 9, 5, 3, 1, 5, -7], s=[*"bcaacbzé"])
    schema = schema_of({"name": "a"}, {"name": "s", "dtype": "string"})
    complete = statistics.complete(schema, path)
    assert complete.categorical[0].vocabulary == (3, 5, 9, -7, 1)
    assert complete.categorical[1].vocabulary == ("a", "b", "c", "z", "é")
    assert complete.is_complete
    assert Schema.from_config(json.loads(json.dumps(complete.to_config()))) == complete


def test_counts_go_across_blocks_and_files(tmp_path: pathlib.Path) -> None:
    values = np.random.default_rng(1).zipf(1.3, 3000) % 500
    (tmp_path / "b").mkdir()
    for part, own in enumerate(np.split(values, 3)):
        (tmp_path / str(part)).mkdir()
        write(tmp_path / str(part), 100, a=own).rename(tmp_path / "b" / f"{part}.parquet")
    found = statistics.complete(schema_of({"name": "a", "min_count": 4}), tmp_path / "b")
    counts = collections.Counter(values.tolist())
    expected = sorted((v for v in counts if counts[v] >= 4), key=lambda v: (-counts[v], v))
    assert found.categorical[0].vocabulary == tuple(expected)


def test_a_shared_table_is_counted_over_all_its_features(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, video=[1, 2, 2], seen=[[1, 3, 4], [1, 5], []])
    schema = schema_of(
        {"name": "video", "min_count": 2},
        {"name": "seen", "max_length": 2, "min_count": 2, "table": "video"},
        {"name": "own", "num_ids": 5},
    )
    with pytest.raises(readers.DataError, match="no column `own`"):
        statistics.complete(schema, path)
    complete = statistics.complete(schema.with_features(schema.features[:2]), path)
    # 1 stands once among the videos, once in a list, and once where a list is cut off.
    assert [f.vocabulary for f in complete.categorical] == [(1, 2), (1, 2)]


def test_padding_is_not_counted(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, seen=[[5], [], [0, 5]], tags=[["x"], [], [""]])
    schema = schema_of(
        {"name": "seen", "max_length": 4},
        {"name": "tags", "dtype": "string", "max_length": 4, "min_count": 1},
    )
    complete = statistics.complete(schema, path)
    assert complete.categorical[0].vocabulary == (5, 0)
    assert complete.categorical[1].vocabulary == ("", "x")


def test_what_is_given_stays(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, a=[3, 3], b=[1, 2], x=[1.0, 2.0])
    schema = schema_of(
        {"name": "a", "vocabulary": (8,)},
        {"name": "b", "hash_buckets": 4},
        {"kind": "dense", "name": "x", "mean": 0.0, "variance": 1.0},
    )
    assert schema.is_complete
    assert statistics.complete(schema, tmp_path / "nowhere") is schema
    more = schema.with_features([*schema.features, Dense(name="y2")])
    path = write(tmp_path, a=[3, 3], b=[1, 2], x=[1.0, 2.0], y2=[1.0, 4.0])
    complete = statistics.complete(more, path)
    assert complete.features[:3] == schema.features
    assert complete.features[3] == Dense(name="y2", mean=2.5, variance=2.25)


@pytest.mark.parametrize("shift", [0.0, 1e5])
def test_mean_and_variance(tmp_path: pathlib.Path, shift: float) -> None:
    values = (np.random.default_rng(2).normal(3.0, 2.0, 5000) + shift).astype(np.float32)
    path = write(tmp_path, 70, x=values)
    found = statistics.complete(schema_of({"kind": "dense", "name": "x"}), path).dense[0]
    exact = values.astype(np.float64)
    assert found.mean == pytest.approx(exact.mean(), rel=1e-12)
    assert found.variance == pytest.approx(exact.var(), rel=1e-9)


@pytest.mark.parametrize("scale", [1e20, 1e-20, 1e-30])
def test_moments_of_any_scale(tmp_path: pathlib.Path, scale: float) -> None:
    values = (np.random.default_rng(2).normal(3.0, 2.0, 5000) * scale).astype(np.float32)
    path = write(tmp_path, 70, x=values)
    found = statistics.complete(schema_of({"kind": "dense", "name": "x"}), path).dense[0]
    exact = values.astype(np.float64) / scale
    assert found.mean == pytest.approx(exact.mean() * scale, rel=1e-12)
    assert found.variance == pytest.approx(exact.var() * scale**2, rel=1e-9)
    encoded = Encode(Schema(features=(found,), labels=("y",)))({"x": tf.constant(values)})
    standard = (exact - exact.mean()) / exact.std()
    # Rounded to float32 once, after arithmetic in float64.
    np.testing.assert_allclose(encoded.dense[:, 0], standard, rtol=2**-23, atol=1e-12)


@pytest.mark.parametrize("text", ["inf", "-inf", "Infinity", "1e39", "-1e40"])
def test_infinities_are_refused_with_their_row(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(f"x,y\n1,0\n2,0\n{text},0\n")
    schema = schema_of({"kind": "dense", "name": "x", "indicator": True})
    with pytest.raises(readers.DataError, match=r"`x`, row 2 .* should be a finite number\. Rec"):
        statistics.complete(schema, tmp_path)


def test_the_lowest_integer_is_a_value_like_any_other(tmp_path: pathlib.Path) -> None:
    """NumPy makes it of a NaN, so it may be the most frequent one."""
    lowest = -(2**63)
    path = write(tmp_path, a=np.array([lowest, 5, lowest, lowest, 5, 6]))
    schema = statistics.complete(schema_of({"name": "a"}), path)
    assert schema.categorical[0].vocabulary == (lowest, 5, 6)
    raw = tf.constant([lowest, 5, 6, 7], tf.int64)
    assert Encode(schema)({"a": raw}).ids["a"].numpy().tolist() == [1, 2, 3, 0]
    assert Schema.from_config(json.loads(json.dumps(schema.to_config()))) == schema


@pytest.mark.parametrize("value", [0.0, 0.1, -3e7])
def test_a_constant_has_variance_one(tmp_path: pathlib.Path, value: float) -> None:
    path = write(tmp_path, 7, x=np.full(1000, value))
    found = statistics.complete(schema_of({"kind": "dense", "name": "x"}), path).dense[0]
    assert found.mean == pytest.approx(float(np.float32(value)), rel=1e-12)
    assert found.variance == 1.0


def test_a_vocabulary_without_values_is_refused(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, a=[1, 2, 3])
    with pytest.raises(readers.DataError, match="no value occurs `min_count` = 2 times") as error:
        statistics.complete(schema_of({"name": "a", "min_count": 2}), path)
    assert "column `a`" in str(error.value)


def test_what_is_left_out_and_constant_is_said(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(
        tmp_path,
        7,
        seen=[[1, 2, 3], [4], []] * 10,
        city=["a"] * 30,
        size=[4] * 30,
        one=[0.1] * 30,
        near=[1.0, float(np.nextafter(np.float32(1), np.float32(2)))] * 15,
        none=[None, 1.0] * 15,
        varies=[5] * 29 + [6],
    )
    schema = schema_of(
        {"name": "seen", "max_length": 2},
        {"name": "city", "dtype": "string"},
        {"name": "size", "num_ids": 9},
        {"kind": "dense", "name": "one", "mean": 0.0, "variance": 1.0},
        {"kind": "dense", "name": "near"},
        {"kind": "dense", "name": "none", "indicator": True},
        {"name": "varies"},
    )
    counted = statistics.count(schema, path)
    # `none` is 1 or missing, which its indicator tells.
    constant = {
        "city": "a",
        "size": 4,
        "one": float(np.float32(0.1)),
        "y": 0.0,
        "near": pytest.approx(1),
    }
    assert counted.constant == constant
    assert counted.tally.rows == 30
    assert counted.schema.is_complete
    assert statistics.complete(schema, path) == counted.schema
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(constant)
    cut = "10 of 30 lists `seen` are longer than `max_length` 2: 10 values at their start are left "
    assert lines[0] == f"{path}: {cut}out."
    assert f"{path}: `city` is 'a' in all rows: nothing can be learned from it." in lines
    assert f"{path}: `one` is 0.1 in all rows: nothing can be learned from it." in lines


def test_every_block_is_observed_once(tmp_path: pathlib.Path) -> None:
    path = write(tmp_path, 7, a=[*range(50)], x=np.arange(50.0))
    seen: list[int] = []
    schema = schema_of({"name": "a"}, {"kind": "dense", "name": "x"})
    complete = statistics.complete(schema, path, lambda block: seen.extend(block["a"]))
    assert seen == [*range(50)]
    # The pass is made for the observer alone, too, and still checks every row.
    assert statistics.complete(complete, path, lambda block: seen.extend(block["a"])) == complete
    assert seen == [*range(50)] * 2
    bad = write(tmp_path, a=[1, None], x=[0.0, 1.0])
    with pytest.raises(readers.DataError, match=r"`a`, row 1 .*is null or absent"):
        statistics.complete(complete, bad, seen.append)
    assert statistics.complete(complete, bad) is complete
