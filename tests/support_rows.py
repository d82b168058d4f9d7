"""Rows of support stores that tell where they belong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qianmo.ops.support_store import METRICS, SupportRows, SupportStore

DIM, LABELS, MAX_ROWS = 3, 2, 4


def content(task: int, when: int, salt: int = 0) -> np.ndarray:
    """h and labels of a row, which tell where it belongs."""
    return np.float32(task * 1000 + when + salt / 8) * np.arange(1, DIM + LABELS + 1, dtype="f4")


def put(store: SupportStore, events: Sequence[tuple[int, ...]], version: int = 1) -> list[int]:
    """Puts a row for each (task, time[, salt[, event id]]); returns the status."""
    rows = np.array([content(*event[:3]) for event in events])
    return (
        store.put(
            task_id=np.array([event[0] for event in events], np.int64),
            h=rows[:, :DIM],
            labels=rows[:, DIM:],
            weights=np.ones([len(events), LABELS], np.float32),
            time=np.array([event[1] for event in events], np.int64),
            event_id=np.array([event[3] if event[3:] else 0 for event in events], np.int64),
            version=np.full(len(events), version, np.int64),
        )
        .numpy()
        .tolist()
    )


def get_events(store: SupportStore, task: int, version: int = 1) -> dict[tuple[int, int], int]:
    """(time, event id) -> salt of a task's rows, in their order, after a look at every number."""
    found = SupportRows(*(part.numpy()[0] for part in store.get([task], version)))
    salts = {}
    for i in range(found.count):
        when, event = int(found.time[i]), int(found.event_id[i])
        salts[when, event] = int((found.h[i, 0] - content(task, when)[0]) * 8)
        row = np.concatenate([found.h[i], found.labels[i]])
        np.testing.assert_array_equal(row, content(task, when, salts[when, event]))
        assert (found.weights[i] == 1).all()
    assert len(salts) == found.count
    assert not any(part[found.count :].any() for part in found[:5])
    assert list(salts) == sorted(salts)
    return salts


def get(store: SupportStore, task: int, version: int = 1) -> dict[int, int]:
    """The same where event ids are 0: time -> salt."""
    found = get_events(store, task, version)
    assert {event for _, event in found} <= {0}
    return {when: salt for (when, _), salt in found.items()}


def stats(store: SupportStore) -> dict[str, int]:
    return dict(zip(METRICS, store.stats([0]).numpy()[0].tolist(), strict=True))
