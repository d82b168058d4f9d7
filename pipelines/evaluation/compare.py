"""A model of several domains beside the models of one domain each."""

from __future__ import annotations

import html
import math
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

from qianmo.export import publishing
from qianmo.export.saved_model import export_in_graph
from qianmo.layers.schema import Domain
from qianmo.models.ranker import Ranker
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import identity, readers
from qianmo.pipelines.data.replay import columns, first_rows
from qianmo.pipelines.evaluation import cost, paired, pictures, report
from qianmo.pipelines.evaluation.measuring import check_data
from qianmo.pipelines.evaluation.paired import Floats, Place
from qianmo.pipelines.evaluation.scores import Scored, score
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.training import runtime

COLOURS = {"worse": "#c0392b", "alike": "#777777", "better": "#0b6e99"}
_POOL = 2**18  # test rows that batches are drawn from, to count keys
_BATCHES = 20  # of each model, to count keys and to take steps on
_TURNS = 6
_REPLAYED = 100  # rows, before an export's size is taken


class Single(NamedTuple):
    """A model of one domain: its directory, recipe and domain."""

    folder: str
    recipe: Recipe
    domain: Domain


def has(recipe: Recipe, domain: Domain, label: str) -> bool:
    """Whether a domain's rows have a label."""
    schema = recipe.schema
    return label in schema.labels and domain in schema.label_domains.get(label, (domain,))


def read_singles(fused: Recipe, folders: Sequence[str]) -> list[Single]:
    """Reads the single models' recipes.

    Raises:
      ValueError: a label is a rating; a model is not of one domain, or of a label that the fused
        model lacks there; two are of the same.
    """
    if not fused.schema.domain:
        raise ValueError("The fused model's `schema.domain` should name the column of domains.")
    for label in fused.schema.labels:
        if fused.schema.kind(label) == "rating":
            raise ValueError(
                f"label `{label}` is a rating, and models are compared by AUC. Measure each by "
                "qianmo-evaluate instead."
            )
    found: list[Single] = []
    by: dict[tuple[Domain, str], str] = {}
    for folder in folders:
        recipe = run_dir.read_recipe(folder)
        domains = recipe.schema.only_domains
        if len(domains) != 1:
            raise ValueError(
                f"{folder}: a single model's `schema.only_domains` should name its one domain; "
                f"write it into its recipe.json. Received: {list(domains)}"
            )
        for label in recipe.schema.labels:
            if not has(fused, domains[0], label):
                raise ValueError(
                    f"{folder}: its labels should be of those that the fused model has in domain "
                    f"{domains[0]}, {[x for x in fused.schema.labels if has(fused, domains[0], x)]}"
                    f". Received: {label!r}"
                )
            if (place := (domains[0], label)) in by:
                raise ValueError(
                    f"{by[place]} and {folder} are both of label `{label}` in domain {domains[0]}; "
                    "give one of them."
                )
            by[place] = folder
        found.append(Single(folder, recipe, domains[0]))
    return found


def rows_to_score(folder: str, recipe: Recipe, given: str) -> str:
    """The rows to score by a model.

    Raises:
      ValueError: none are named.
      readers.DataError: they, or the training rows, are not there or hold none of its domains.
    """
    path = given or recipe.data.test
    if not path:
        raise ValueError(f"{folder}: its recipe names no test rows; give --test.")
    for rows in (path, recipe.data.train):
        readers.count_rows(recipe.schema, rows)  # what is wrong with them is said before the work
    return path


def same_rows(fused: Recipe, scored: Scored, single: Single, alone: Scored) -> Any:
    """Which of the fused model's rows a single model has scored, in the same order.

    Raises:
      ValueError: they are not the same rows.
    """
    rows = np.flatnonzero(readers.is_of(scored.columns["domain"], (single.domain,)))
    count = len(alone.labels)
    fault = f"{count} rows, and the fused model {len(rows)}" if count != len(rows) else ""
    if not fault:
        pairs = {
            label: (scored.labels[rows, fused.schema.labels.index(label)], alone.labels[:, k])
            for k, label in enumerate(single.recipe.schema.labels)
        }
        if "task_id" in scored.columns and "task_id" in alone.columns:
            pairs["task_id"] = scored.columns["task_id"][rows], alone.columns["task_id"]
        for name, (one, other) in pairs.items():
            differs = (one != other) & ((one == one) | (other == other))  # NaN is no label in both
            if len(wrong := np.flatnonzero(differs)):
                fault = f"{name} {other[wrong[0]]} in its row {wrong[0]}, and not {one[wrong[0]]}"
    if fault:
        raise ValueError(
            f"{single.folder} should score the fused model's test rows of domain {single.domain}, "
            f"in the same order. Received: {fault}. Give --test, rows for all models."
        )
    return rows


def names(domain: Any) -> Any:
    """Domains as schemas name them: text where rows hold UTF-8."""
    is_text = len(domain) and isinstance(domain[0], bytes)
    return np.array([d.decode() for d in domain], object) if is_text else domain


def places(
    fused: Recipe, scored: Scored, head: str, alone: Sequence[tuple[Single, Scored, str]]
) -> list[Place]:
    """Brings together both models' scores of the same rows; with each model's scores, its head."""
    domain = names(scored.columns["domain"])
    task_id = scored.columns.get("task_id", np.arange(len(domain)))
    user = np.unique(task_id, return_inverse=True)[1]
    by: dict[tuple[Domain, str], tuple[str, Floats]] = {}
    for single, own, own_head in alone:
        rows = same_rows(fused, scored, single, own)
        for k, label in enumerate(single.recipe.schema.labels):
            whole = np.full(len(domain), np.nan)
            whole[rows] = own.probabilities[own_head][:, k]
            by[single.domain, label] = single.folder, whole
    found = []
    for k, label in enumerate(fused.schema.labels):
        y = scored.labels[:, k]
        for d in np.unique(domain[~np.isnan(y)]).tolist():
            rows = np.flatnonzero((domain == d) & ~np.isnan(y))
            scores = {"fused": scored.probabilities[head][rows, k]}
            folder = ""
            if (d, label) in by:
                folder, whole = by[d, label]
                scores["single"] = whole[rows]
            found.append(Place(label, d, folder, y[rows], user[rows], scores))
    return found


class Member(NamedTuple):
    """A model, its recipe, the rows that it scores, and its domain; None for all."""

    model: Ranker
    recipe: Recipe
    test: str
    domain: Domain | None


def keys_of_batches(fused: Member, singles: Sequence[Member]) -> list[dict[str, float]]:
    """Distinct rows of each table that a batch of test rows reads, on average.

    The fused model reads the whole batch, and each single model the rows of its domain in it.

    Returns:
      Table -> rows of the fused model, and then of each single one.
    """
    pool = columns(fused.model.schema, fused.test, _POOL)
    domain = names(pool[fused.model.schema.domain])
    size = min(fused.recipe.train.batch_size, len(domain))
    count = min(len(domain) // size, _BATCHES)
    batch = np.full(len(domain), -1)
    order = np.random.default_rng(0).permutation(len(domain))[: count * size]
    batch[order] = np.arange(count * size) // size

    def mean(model: Ranker, rows: Mapping[str, Any], of: Any) -> dict[str, float]:
        names = model.schema.input_names
        batches = [{n: tf.constant(rows[n][of == i]) for n in names} for i in range(count)]
        return cost.mean_keys(model, batches)

    found = [mean(fused.model, pool, batch)]
    for one in singles:
        own = batch[domain == one.domain]
        found.append(mean(one.model, columns(one.model.schema, one.test, len(own)), own))
    return found


def costs(fused: Member, singles: Sequence[Member]) -> list[dict[str, float]]:
    """What the models cost, the fused one first; their weights are others afterwards."""
    members = [fused, *singles]
    size = fused.recipe.train.batch_size
    read = keys_of_batches(fused, singles)
    sizes = []
    with tempfile.TemporaryDirectory() as temporary:
        for i, one in enumerate(members):
            base = pathlib.Path(temporary) / str(i)
            rows = first_rows(one.model.schema, one.test, _REPLAYED)
            folder, _ = export_in_graph(one.model, base, rows)
            sizes.append(cost.size_of(folder) / 1e6)
    trainings = [
        cost.Training(one.model, one.recipe, cost.first_batches(one.recipe, _BATCHES))
        for one in members
    ]
    took = cost.times({i: training.step for i, training in enumerate(trainings)}, _TURNS)
    found = []
    for i, training in enumerate(trainings):
        recipe = training.recipe
        numbers = cost.parameters(training.model)
        step = float(np.median(took[i]))
        steps = readers.count_rows(recipe.schema, recipe.data.train) / recipe.train.batch_size
        found.append(
            {
                "dense parameters": numbers["dense"],
                "parameters of tables": numbers["tables"],
                f"keys of {size:,} rows": sum(read[i].values()),
                "MB moved by a step on them": training.bytes_moved(read[i]) / 1e6,
                "ms a step": 1e3 * step,
                "s a pass": step * math.ceil(steps),
                "MB of an export": sizes[i],
            }
        )
    return found


def compare(model_dir: str, folders: Sequence[str], test: str = "") -> dict[str, Any]:
    """Scores, measures and compares.

    Args:
      model_dir: directory of the fused model.
      folders: directories of the single models.
      test: rows to score; default: those that each recipe names.

    Returns:
      What the .json file holds.

    Raises:
      ValueError: the models or their rows do not fit each other.
    """
    runtime.settle()
    recipe = run_dir.read_recipe(model_dir)
    singles = read_singles(recipe, folders)
    path = rows_to_score(model_dir, recipe, test)
    if not test:
        for folder, own in [(model_dir, recipe), *((one.folder, one.recipe) for one in singles)]:
            check_data(folder, own, "test", flags="--test")
    own_paths = [rows_to_score(single.folder, single.recipe, test) for single in singles]
    fused = Member(run_dir.load(model_dir)[0], recipe, path, None)
    alone = [
        Member(run_dir.load(single.folder)[0], single.recipe, own, single.domain)
        for single, own in zip(singles, own_paths, strict=True)
    ]
    with identity.taking(fused.model.schema, path) as taken:
        scored = score(fused.model, path, progress=True)
        own_rows = taken.result()
        taken.check_unchanged()
    each = [
        (single, score(one.model, one.test), one.model.serving_head)
        for single, one in zip(singles, alone, strict=True)
    ]
    found = places(recipe, scored, fused.model.serving_head, each)
    domains = paired.measure(found, grouped="task_id" in scored.columns)
    whole, *parts = costs(fused, alone)
    total = {key: sum(part[key] for part in parts) for key in whole}
    return {
        "model_dir": str(model_dir),
        "test": path,
        "test_sha256": own_rows.sha256,
        "resamples": paired.RESAMPLES,
        "domains": domains,
        "costs": {
            "fused": whole,
            "single": dict(zip(folders, parts, strict=True)),
            "sum": total,
            "ratio": {key: whole[key] / total[key] if total[key] else math.nan for key in whole},
        },
    }


def _cells(entry: Mapping[str, Any]) -> list[str]:
    counts = [f"{entry[k]:,}" if k in entry else "" for k in ("rows", "users")]
    cells = [entry["label"], str(entry["domain"]), *counts]
    for name in paired.METRICS:
        one = entry[name] or {}
        cells += [f"{one[k]:.4f}" if k in one else "" for k in ("single", "fused")]
        told = "{difference:+.4f} ({standard_error:.4f})"
        cells.append(told.format(**one) if "single" in one else "")
    return cells


HEADER = (
    *("label", "domain", "rows", "users"),
    *("AUC single", "fused", "difference (s.e.)", "GAUC single", "fused", "difference (s.e.)"),
)


def _cost_rows(costs: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["", f"{len(costs['single'])} single models", "fused", "fused / single"]

    def shown(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    rows = [
        [key, shown(costs["sum"][key]), shown(value), f"{costs['ratio'][key]:.2f}"]
        for key, value in costs["fused"].items()
    ]
    return header, rows


def _text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def verdict(entries: Sequence[Mapping[str, Any]]) -> str:
    """What to take from the differences."""
    worse = paired.seesaw(entries)
    lines = [f"SEESAW: {sentence}." for sentence in worse]
    if not any("single" in (e[name] or {}) for e in entries for name in paired.METRICS):
        lines.append("No domain that has a single model has rows of enough users to compare.")
    elif not worse:
        lines.append("No domain is below its single model by more than two standard errors.")
    if without := [f"{e['domain']} ({e['label']})" for e in entries if not e["single"]]:
        lines.append(f"No single model was given for domains {', '.join(without)}.")
    if any(entry[name] is None for entry in entries for name in paired.METRICS):
        lines.append(f"Metrics of fewer than {paired.FEWEST_USERS} users are left out.")
    return "\n".join(lines)


def table(found: Mapping[str, Any]) -> str:
    """The comparison as text."""
    header, rows = _cost_rows(found["costs"])
    return "\n\n".join(
        [
            _text(HEADER, [_cells(entry) for entry in found["domains"]]),
            verdict(found["domains"]),
            _text(header, rows),
        ]
    )


def figure(entries: Sequence[Mapping[str, Any]]) -> Any:
    """The differences of each domain, with bars of two standard errors to either side."""
    names = [name for name in paired.METRICS if any(entry[name] for entry in entries)]
    labels = list(dict.fromkeys(entry["label"] for entry in entries))
    most = max(sum(e["label"] == label for e in entries) for label in labels)
    whole, axes = plt.subplots(
        len(labels),
        len(names),
        figsize=(5.5 * len(names), len(labels) * (1.2 + 0.36 * most)),
        squeeze=False,
    )
    for row, label in zip(axes, labels, strict=True):
        for axis, name in zip(row, names, strict=True):
            shown = [e for e in entries if e["label"] == label and "single" in (e[name] or {})]
            for y, entry in enumerate(shown):
                one = entry[name]
                axis.errorbar(
                    one["difference"],
                    y,
                    xerr=2 * one["standard_error"],
                    fmt="s" if entry["domain"] == "mean" else "o",
                    capsize=3,
                    color=COLOURS[one["verdict"]],
                )
            axis.axvline(0, color="#999999", linestyle="--", linewidth=1)
            axis.set_yticks(range(len(shown)), [str(e["domain"]) for e in shown])
            axis.set_ylim(len(shown) - 0.5, -0.5)
            axis.set(title=f"{name.upper()} of {label}", ylabel="domain")
            axis.set_xlabel("fused minus single, bars of 2 standard errors")
            axis.grid(alpha=0.25)
    return whole


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line)
        for tag, line in (("th", header), *(("td", row) for row in rows))
    ]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def body(found: Mapping[str, Any]) -> list[str]:
    """The comparison as parts of an HTML page."""
    entries = found["domains"]
    colour = COLOURS["worse" if paired.seesaw(entries) else "alike"]
    said = html.escape(verdict(entries)).replace("\n", "<br>")
    shown = []
    if any(entry[name] for entry in entries for name in paired.METRICS):
        shown.append(pictures.picture(figure(entries), "differences, with standard errors"))
    return [
        f'<p style="color: {colour}; font-weight: bold">{said}</p>',
        *shown,
        _html_table(HEADER, [_cells(entry) for entry in entries]),
        "<h2>Cost</h2>",
        _html_table(*_cost_rows(found["costs"])),
        '<p class="note">Differences are fused minus single, on the same rows; standard errors '
        f"from {found['resamples']} bootstrap draws of the users. Costs of the single models are "
        "sums; keys are the distinct table rows that a batch reads, each single model those of its "
        f"own rows. Test rows: {html.escape(found['test'])}, sha256 "
        f"{found['test_sha256'][:16]}…</p>",
    ]


def write(path: pathlib.Path, found: Mapping[str, Any]) -> None:
    """Writes the page, and the JSON beside it."""
    name = f"{found['model_dir']} against {len(found['costs']['single'])} single models"
    path.parent.mkdir(parents=True, exist_ok=True)
    with publishing.writing(path) as page:
        page.write(report.page(name, [f"<h1>{html.escape(name)}</h1>", *body(found)]))
        run_dir.write_json(path.with_suffix(".json"), found)
