"""KuaiRand's tabs with labels and features of their own, in one model and in one for each tab.

The split k5 of `domains_kuairand`, from which the rows of tabs that do not own a feature lose it
(configs/kuairand_apart.py). Models train and are measured as there: AUC of each tab and label that
it has, paired by seed, standard errors from a bootstrap over the test users.
"""

from __future__ import annotations

import functools
from typing import Any

import bench_domains_kuairand as tabs
import common
import domains
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tf_keras

from qianmo.configs import kuairand_apart as recipes
from qianmo.layers import metrics
from qianmo.pipelines.evaluation.paired import RESAMPLES
from qianmo.pipelines.training import runtime

SPLIT = "apart"
SINGLE, ASSEMBLY = "one model per tab, its own features", "shared + own experts, gate, star tower"
SHARED, FILLED = "one model, the features that all share", "one model, zeros for what a tab lacks"
WIDER = "the same, wider (capacity control)"
DESIGNS = {
    SINGLE: "single",
    SHARED: "shared",
    FILLED: "filled",
    WIDER: "wider",
    ASSEMBLY: "cross_domain",
}
SEEDS = (1, 2, 3)


def withheld(rows: pa.Table) -> pa.Table:
    """Rows without the features that their tabs do not own."""
    for name, owners in recipes.FEATURES.items():
        owned = pc.is_in(rows["tab"], pa.array(owners, rows["tab"].type))
        kept = pc.if_else(owned, rows[name], pa.scalar(None, rows[name].type))
        rows = rows.set_column(rows.column_names.index(name), name, kept)
    return rows


def prepare() -> None:
    """Writes the rows of all tabs together, and of each by itself, once."""
    tabs.prepare()
    if (tabs.WORK / SPLIT / "test.parquet").exists():
        return
    for tab in (*tabs.TABS, None):  # all of them last, so that a run that was killed begins anew
        folder = tabs.WORK / (SPLIT if tab is None else f"{SPLIT}_{tab}")
        folder.mkdir(exist_ok=True)
        for part in ("train", "valid", "test"):
            rows = withheld(pq.read_table(tabs.WORK / "k5" / f"{part}.parquet"))
            if tab is not None:
                rows = rows.filter(pc.equal(rows["tab"], tab))
            pq.write_table(rows, folder / f"{part}.parquet")


def has(label: str, tab: int) -> bool:
    """Whether the rows of a tab have the label."""
    return tab in recipes.LABELS.get(label, (tab,))


def aucs(test: dict[str, Any], found: domains.Floats) -> domains.Floats:
    """[label, tab, 1 + resample], NaN where a tab has no such label; the first of all rows."""
    users, code = np.unique(test["user_id"], return_inverse=True)
    drawn = domains.draws(users)
    values = np.full((len(tabs.LABELS), len(tabs.TABS), RESAMPLES + 1), np.nan)
    for t, tab in enumerate(tabs.TABS):
        rows = test["tab"] == tab
        for k, label in enumerate(tabs.LABELS):
            if has(label, tab):
                values[k, t] = metrics.resampled_auc(
                    test[label][rows], found[rows, k], drawn[:, code[rows]]
                )
    return values


def measured(variant: str, test: dict[str, Any], seeds: tuple[int, ...]) -> domains.Floats:
    """`aucs` of a design, means over seeds."""
    names = [f"single_{tab}" for tab in tabs.TABS] if variant == "single" else [variant]
    found = np.zeros((len(seeds), len(test["tab"]), len(tabs.LABELS)), np.float32)
    for name in names:
        tf_keras.backend.clear_session()
        split = name.replace("single", SPLIT) if variant == "single" else SPLIT
        trainer = domains.Trainer(recipes.get_config(name), tabs.WORK / split, tabs.MOST_PASSES)
        labels = [tabs.LABELS.index(label) for label in trainer.recipe.schema.labels]
        rows = test["tab"] == int(name[7:]) if variant == "single" else np.full(len(found[0]), True)
        for place, seed in enumerate(seeds):
            scored, passes, seconds = trainer(seed)
            found[place][np.ix_(rows, labels)] = scored
            print(f"{name} seed {seed}: {passes} passes, {seconds:.1f} s each", flush=True)
    return np.mean([aucs(test, one) for one in found], 0)


def run(*, quick: bool) -> dict[str, Any]:
    """All designs."""
    runtime.settle()
    prepare()
    columns = ["tab", "user_id", *tabs.LABELS]
    table = pq.read_table(tabs.WORK / SPLIT / "test.parquet", columns=columns)
    test = {name: table[name].to_numpy() for name in columns}
    designs = {d: v for d, v in DESIGNS.items() if not quick or v in ("shared", "cross_domain")}
    seeds = SEEDS[:1] if quick else SEEDS
    found = {design: measured(variant, test, seeds) for design, variant in designs.items()}
    mean = functools.partial(np.nanmean, axis=0)
    rows, targets = [], {}
    for k, label in enumerate(tabs.LABELS):
        own = [t for t, tab in enumerate(tabs.TABS) if has(label, tab)]
        for design, values in found.items():
            row = {
                "label": label,
                "model": design,
                "AUC, mean of its tabs": f"{mean(values[k, own])[0]:.4f}",
            }
            for other in (SHARED, FILLED, WIDER, SINGLE):
                if other in found:
                    row[f"against {other}"] = domains.thousandths(
                        mean(values[k, own]), mean(found[other][k, own])
                    )
            rows.append(row)
        for other in [design for design in found if design != ASSEMBLY]:
            gain, error = domains.difference(
                mean(found[ASSEMBLY][k, own]), mean(found[other][k, own])
            )
            said = f"{label}: the assembly - {other}"
            if other in (FILLED, WIDER):
                targets[said] = common.target(gain, -0.005)
            else:
                targets[f"{said}, lower end of 95 %"] = common.target(gain - 1.96 * error, 0)
    return {"data_sha256": common.sha256(tabs.WORK / SPLIT), "rows": rows, "targets": targets}
