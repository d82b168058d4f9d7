"""KuaiRand's five largest tabs in one model, by many designs, against one model for each tab.

Splits: k5 trains to 29 April and tests on 1 to 5 May; kf has five folds by user, so that every test
user is new; rolling trains anew for each of these five days, on all days but the one before, which
validates. Every design has the same features, and trains until its mean AUC over tabs and labels
falls on validation rows (in k5 of 30 April, in kf of a tenth of the other users). The wider plain
model is the capacity control. Differences are of means over seeds (k5), folds or days, and their
standard errors come from a bootstrap that draws each test user once for all of these. AUCs are of
one tab and label each, never pooled over tabs or days. Finished runs are kept under
runs/benchmarks, from where a benchmark that was killed goes on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import common
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from domains import (
    Floats,
    Trainer,
    difference,
    draws,
    thousandths,
)

from qianmo.configs import kuairand_domains as recipes
from qianmo.layers import metrics
from qianmo.pipelines import run_dir
from qianmo.pipelines.evaluation.paired import RESAMPLES
from qianmo.pipelines.training import runtime

TABS = recipes.TABS
SMALL = TABS[1:]
LABELS = ("is_click", "long_view")
WORK = common.CACHE / "domains_kuairand"
PARTIAL = common.CACHE / "domains_kuairand.partial.json"

SINGLE = "one model per tab"
DOMAIN_ID, WIDER = "one model, tab as a feature", "the same, wider (capacity control)"
ASSEMBLY = "shared + own experts, gate, star tower"
DESIGNS = {
    SINGLE: "single",
    "one model, tab unknown to it": "no_domain_id",
    DOMAIN_ID: "domain_id",
    WIDER: "wider",
    "shared-bottom": "shared_bottom",
    "MMoE": "mmoe",
    "PLE": "ple",
    "STAR": "star",
    "STAR, partitioned norm": "star_norm",
    "STAR, auxiliary network": "star_auxiliary",
    "shared + own experts, gate, plain tower": "cross_domain_plain_tower",
    ASSEMBLY: "cross_domain",
    "PPNet": "ppnet",
    "EPNet": "epnet",
    "PEPNet": "pepnet",
}
SPLITS = {
    "k5": ("k5",),
    "kf": tuple(f"kf{fold}" for fold in range(5)),
    "rolling": tuple(f"rolling{day}" for day in range(1, 6)),
}
SEEDS = {"k5": (1, 2, 3, 4, 5), "kf": (1,), "rolling": (1,)}
MAIN = (SINGLE, DOMAIN_ID, WIDER, ASSEMBLY)  # the other designs are on k5 alone
MOST_PASSES = 6


def prepare() -> None:
    """Writes the splits' rows, of the five tabs, once."""
    if (WORK / SPLITS["rolling"][-1] / "test.parquet").exists():
        return
    folder = common.kuairand()
    rows = pa.concat_tables(
        [pq.read_table(folder / f"{part}.parquet") for part in ("train", "valid", "test")]
    )
    rows = rows.filter(pc.is_in(rows["tab"], pa.array(TABS, rows["tab"].type)))
    date, user = rows["date"].to_numpy(), rows["user_id"].to_numpy()
    users, code = np.unique(user, return_inverse=True)
    random = np.random.default_rng(0)
    fold = random.integers(0, 5, len(users))[code]
    is_valid = random.random(len(users))[code] < 0.1
    parts = {"k5": (date <= 20220429, date == 20220430, date >= 20220501)}
    for i in range(5):
        parts[f"kf{i}"] = ((fold != i) & ~is_valid, (fold != i) & is_valid, fold == i)
    days = np.unique(date)
    for split, before, day in zip(SPLITS["rolling"], days[-6:-1], days[-5:], strict=True):
        parts[split] = (date < before, date == before, date == day)
    for split, chosen in parts.items():
        (WORK / split).mkdir(parents=True, exist_ok=True)
        for name, which in zip(("train", "valid", "test"), chosen, strict=True):
            pq.write_table(rows.filter(pa.array(which)), WORK / split / f"{name}.parquet")


class Runs:
    """Units of work, a design on a split with a seed, each done once."""

    def __init__(self, *, keep: bool = True) -> None:
        runtime.settle()
        prepare()
        self.keep = keep
        self.done = run_dir.read_json(PARTIAL, {}) if keep else {}
        self.folder = WORK / "scores"
        self.folder.mkdir(exist_ok=True)
        self.tests: dict[str, dict[str, Any]] = {}

    def test(self, split: str) -> dict[str, Any]:
        """Tabs, users and labels of the test rows."""
        if split not in self.tests:
            table = pq.read_table(
                WORK / split / "test.parquet", columns=["tab", "user_id", *LABELS]
            )
            self.tests[split] = {name: table[name].to_numpy() for name in table.column_names}
        return self.tests[split]

    def __call__(self, variant: str, split: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
        """For each seed the scores of all test rows, [N, 2], and what the training took."""
        names = [f"single_{tab}" for tab in TABS] if variant == "single" else [variant]
        described = [recipes.get_config(name).to_json() for name in names]
        keys = {}
        for seed in seeds:
            said = json.dumps([described, split, seed, MOST_PASSES])
            keys[seed] = (
                f"{variant}_{split}_{seed}_{hashlib.sha256(said.encode()).hexdigest()[:12]}"
            )
        missing = [s for s, key in keys.items() if key not in self.done]
        if missing:
            start = time.perf_counter()
            tabs = self.test(split)["tab"]
            found = {seed: np.zeros((len(tabs), len(LABELS)), np.float32) for seed in missing}
            told: dict[int, dict[str, Any]] = {
                seed: {"parameters": 0, "passes": [], "seconds of a pass": 0.0} for seed in missing
            }
            for name in names:
                trainer = Trainer(recipes.get_config(name), WORK / split, MOST_PASSES)
                rows = tabs == int(name[7:]) if variant == "single" else slice(None)
                for seed in missing:
                    found[seed][rows], passes, seconds = trainer(seed)
                    told[seed]["parameters"] += trainer.parameters()
                    told[seed]["passes"].append(passes)
                    told[seed]["seconds of a pass"] += seconds
            for seed in missing:
                np.save(self.folder / f"{keys[seed]}.npy", found[seed])
                self.done[keys[seed]] = told[seed]
            spent = time.perf_counter() - start
            print(f"{variant} {split} {missing}: {told}, {spent:.0f} s", flush=True)
            if self.keep:
                run_dir.write_json(PARTIAL, self.done)
        return [
            {**self.done[key], "scores": np.load(self.folder / f"{key}.npy")}
            for key in keys.values()
        ]


def tab_aucs(runs: Runs, design: str, split: str, seeds: Sequence[int]) -> tuple[Floats, Floats]:
    """AUCs [label, tab, 1 + resample], the first of the rows as they are, and tab 1's GAUC [label].

    Both are means over the split's parts and the seeds.
    """
    tests = [runs.test(part) for part in SPLITS[split]]
    users = np.unique(np.concatenate([test["user_id"] for test in tests]))
    drawn = draws(users)
    aucs = np.zeros((len(LABELS), len(TABS), RESAMPLES + 1))
    gaucs = np.zeros(len(LABELS))
    for part, test in zip(SPLITS[split], tests, strict=True):
        code = np.searchsorted(users, test["user_id"])
        for one in runs(DESIGNS[design], part, seeds):
            for t, tab in enumerate(TABS):
                rows = test["tab"] == tab
                weights = drawn[:, code[rows]]
                for k, label in enumerate(LABELS):
                    y, p = test[label][rows], one["scores"][rows, k]
                    aucs[k, t] += metrics.resampled_auc(y, p, weights)
                    if tab == TABS[0]:
                        gaucs[k] += metrics.gauc(y, p, code[rows])
    count = len(tests) * len(seeds)
    return aucs / count, gaucs / count


def by_tab(one: Floats, other: Floats) -> dict[str, str]:
    """Differences of AUCs [tab, 1 + resample]: the mean of the small tabs, and each tab."""
    found = {"small tabs": thousandths(one[1:].mean(0), other[1:].mean(0))}
    return found | {f"tab {tab}": thousandths(one[t], other[t]) for t, tab in enumerate(TABS)}


def run(*, quick: bool) -> dict[str, Any]:
    """All designs on k5, some on the other splits."""
    runs = Runs(keep=not quick)
    splits: Mapping[str, Sequence[int]] = {"k5": (1,)} if quick else SEEDS
    rows, targets = [], {}
    for split, seeds in splits.items():
        chosen = DESIGNS if split == "k5" and not quick else MAIN
        found = {design: tab_aucs(runs, design, split, seeds) for design in chosen}
        for k, label in enumerate(LABELS):
            auc = {design: aucs[k] for design, (aucs, _) in found.items()}
            where = {"split": split, "label": label}
            for design, own in auc.items():
                done = runs(DESIGNS[design], SPLITS[split][0], seeds)
                row = where | {
                    "model": design,
                    "AUC, mean of the tabs": f"{own.mean(0)[0]:.4f}",
                    "GAUC, tab 1": f"{found[design][1][k]:.4f}",
                    "against the tab as a feature": thousandths(
                        own.mean(0), auc[DOMAIN_ID].mean(0)
                    ),
                    "against one per tab": thousandths(own.mean(0), auc[SINGLE].mean(0)),
                }
                rows.append(
                    row | by_tab(own, auc[SINGLE]) | {"dense parameters": done[0]["parameters"]}
                )
            own, single, wider = auc[ASSEMBLY], auc[SINGLE], auc[WIDER]
            rows.append(where | {"model": "the assembly, against the wider"} | by_tab(own, wider))
            said = f"{split}, {label}: the assembly"
            gain, error = difference(own[1:].mean(0), single[1:].mean(0))
            targets[f"{said} - one model per tab, small tabs"] = common.target(gain, 0.020)
            targets[f"{said} - one model per tab, small tabs, lower end of 95 %"] = common.target(
                gain - 1.96 * error, 0
            )
            worst = min(np.divide(*difference(own[t], single[t])) for t in range(len(TABS)))
            targets[f"{said} - one model per tab, worst tab in standard errors"] = common.target(
                worst, -2
            )
            for other in (DOMAIN_ID, WIDER):
                gain, _ = difference(own.mean(0), auc[other].mean(0))
                targets[f"{said} - {other}"] = common.target(gain, -0.005)
            gain, error = difference(own[1], wider[1])
            targets[f"{said} - {WIDER}, tab 0, lower end of 95 %"] = common.target(
                gain - 1.96 * error, 0
            )
    return {
        "data_sha256": {
            part: common.sha256(WORK / part) for split in splits for part in SPLITS[split]
        },
        "rows": rows,
        "targets": targets,
    }
