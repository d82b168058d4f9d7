"""MovieLens-1M's three ages of users as domains, in one model by many designs and in one for each.

All ratings, liked if 4 or 5; a random 80 % trains, 10 % validates and 10 % tests, which is no one
else's split. Every design has the same features and trains until its AUC, the mean of the domains,
falls on validation rows. The wider plain model is the capacity control. AUCs are of one domain
each, means over the seeds; standard errors of their differences come from a bootstrap over the test
users. What an interrupted run has measured is kept.
"""

from __future__ import annotations

import functools
from typing import Any

import common
import numpy as np
import pyarrow.parquet as pq
from domains import Floats, Trainer, difference, draws, thousandths

from qianmo.configs import movielens_1m_domains as recipes
from qianmo.layers import metrics
from qianmo.pipelines.training import runtime

SINGLE = "one model per domain"
DOMAIN_ID, WIDER = "one model, domain as a feature", "the same, wider (capacity control)"
ASSEMBLY = "shared + own experts, gate, plain tower"
DESIGNS = {
    SINGLE: "single",
    DOMAIN_ID: "domain_id",
    WIDER: "wider",
    "STAR": "star",
    ASSEMBLY: "cross_domain",
}
AGES = ("< 25", "25-34", ">= 35")
SEEDS = (1, 2, 3)
MOST_PASSES = 10


@functools.lru_cache(maxsize=1)
def trainer(name: str, most_passes: int) -> Trainer:
    """A recipe's, traced once for all seeds."""
    return Trainer(recipes.get_config(name), common.movielens_1m("ages"), most_passes)


def measured(name: str, seed: int, most_passes: int) -> dict[str, Any]:
    """A recipe's AUCs, a row [1 + resample] for each of its domains, the first of all test rows."""
    columns = ["age_group", "user_id", "label"]
    table = pq.read_table(common.movielens_1m("ages") / "test.parquet", columns=columns)
    domain, user, label = (column.to_numpy() for column in table.columns)
    users, code = np.unique(user, return_inverse=True)
    drawn = draws(users)
    train = trainer(name, most_passes)
    found, passes, seconds = train(seed)
    print(f"{name}, seed {seed}: {passes} passes, {seconds:.0f} s each", flush=True)
    of_model = train.recipe.schema.only_domains or recipes.DOMAINS
    scores = np.zeros(len(domain), np.float32)
    scores[np.isin(domain, of_model)] = found[:, 0]  # the order of the rows is the file's
    aucs = []
    for d in of_model:
        own = domain == d
        aucs.append(metrics.resampled_auc(label[own], scores[own], drawn[:, code[own]]).tolist())
    return {"aucs": aucs, "passes": passes, "parameters": train.parameters()}


def run(*, quick: bool) -> dict[str, Any]:
    """All designs."""
    runtime.settle()
    seeds, most_passes = ((1,), 1) if quick else (SEEDS, MOST_PASSES)
    designs = [SINGLE, DOMAIN_ID, ASSEMBLY] if quick else [*DESIGNS]
    auc: dict[str, Floats] = {}
    told: dict[str, tuple[str, int]] = {}
    for design in designs:
        variant = DESIGNS[design]
        names = [f"single_{d}" for d in recipes.DOMAINS] if design == SINGLE else [variant]
        units: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for name in names:
            for seed in seeds:
                unit = functools.partial(measured, name, seed, most_passes)
                found = unit() if quick else common.kept("domains_ml1m", f"{name}, {seed}", unit)
                units[name].append(found)
        each = [np.mean([one["aucs"] for one in found], 0) for found in units.values()]
        auc[design] = np.concatenate(each)
        passes = (", ".join(str(one["passes"]) for one in found) for found in units.values())
        told[design] = "; ".join(passes), sum(found[0]["parameters"] for found in units.values())
    rows, targets = [], {}
    for design, own in auc.items():
        row = {"model": design, "AUC, mean": f"{own.mean(0)[0]:.4f}"}
        row |= {f"age {age}": f"{own[d, 0]:.4f}" for d, age in enumerate(AGES)}
        for other, said in ((DOMAIN_ID, "the domain as a feature"), (SINGLE, "one per domain")):
            row[f"against {said}"] = thousandths(own.mean(0), auc[other].mean(0))
        rows.append(row | {"passes": told[design][0], "dense parameters": f"{told[design][1]:,}"})
    single = auc[SINGLE]
    for other in [o for o in (SINGLE, DOMAIN_ID, WIDER) if o in auc]:
        gain, error = difference(auc[ASSEMBLY].mean(0), auc[other].mean(0))
        said = f"the assembly - {other}"
        targets[said] = common.target(gain, 0 if other == SINGLE else -0.005)
        targets[f"{said}, lower end of 95 %"] = common.target(gain - 1.96 * error, 0)
    worst = min(
        np.divide(*difference(own, alone)) for own, alone in zip(auc[ASSEMBLY], single, strict=True)
    )
    targets[f"the assembly - {SINGLE}, worst domain in standard errors"] = common.target(worst, -2)
    if not quick:
        common.finished("domains_ml1m")
    digests = common.sha256(common.movielens_1m("ages"))
    return {"data_sha256": digests, "rows": rows, "targets": targets}
