"""The pictures of a report: curves, calibration, sizes, and what the rows are."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed

import matplotlib.pyplot as plt
import numpy as np

from qianmo.layers import metrics
from qianmo.pipelines.data.summaries import Column, Summary
from qianmo.pipelines.evaluation.scores import Scored

# Okabe and Ito's colours, which readers with any colour vision tell apart.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
STYLES = {"student": "-", "model": "-", "adapted": "-", "teacher": "--", "plain": ":"}
TITLES = {
    "auc": "AUC",
    "gauc": "GAUC",
    "log_loss": "log loss",
    "ndcg_10": "NDCG@10",
    "rmse": "RMSE",
    "mae": "MAE",
}
_MAX_PICTURES = 12  # of features' histograms


def colour(number: int) -> str:
    """The colour of the n-th label, head or term."""
    return PALETTE[number % len(PALETTE)]


def picture(figure: Any, alt: str) -> str:
    """A figure as an element of HTML that holds it."""
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _finish(*axes: Any) -> None:
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, framealpha=0.7, edgecolor="none")


def headline(found: Mapping[str, float]) -> str:
    """The metric that a curve shows."""
    return next(name for name in ("auc", "ndcg_10", "rmse") if name in found)


def curves(points: Sequence[Sequence[Any]], history: Sequence[Mapping[str, Any]]) -> Any:
    """The loss within epochs, by its terms, and validation metrics after each, by label and head.

    Args:
      points: [step, name -> mean over the steps since the last point].
      history: an entry for each epoch.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    steps = [entry["step"] for entry in history]
    names = list(dict.fromkeys(name for _, means in points for name in means))
    for number, name in enumerate(names):
        pairs = [(step, means[name]) for step, means in points if name in means]
        style = {"marker": ".", "linestyle": "none"} if name == "valid" else {"linewidth": 1}
        shown = "validation sample" if name == "valid" else name
        left.plot(*zip(*pairs, strict=True), color=colour(number), label=shown, **style)
    if not points:
        for number, name in enumerate(history[0]["train"]):
            losses = [e["train"][name] for e in history]
            left.plot(steps, losses, "o-", color=colour(number), label=name)
    for step in steps[:-1]:
        left.axvline(step, color="#dddddd", zorder=0)
    left.set(title="Loss and its terms", xlabel="step", ylabel="mean of a row")
    title = "No validation rows"
    if "valid" in history[0]:
        labels = list(next(iter(history[0]["valid"].values())))
        for head, by_label in history[0]["valid"].items():
            for label, first in by_label.items():
                name = headline(first)
                values = np.array([e["valid"][head][label][name] for e in history], float)
                right.plot(
                    [e["epoch"] for e in history],
                    values,
                    marker="o",
                    linestyle=STYLES.get(head, "-"),
                    color=colour(labels.index(label)),
                    label=f"{label}, {head}",
                )
                for x, y in zip([e["epoch"] for e in history], values, strict=True):
                    if np.isfinite(y):
                        right.annotate(f"{y:.4f}", (x, y), fontsize=7, ha="center", va="bottom")
                title = f"Validation {TITLES[name]}"
    right.set(title=title, xlabel="epoch")
    right.set_xticks([e["epoch"] for e in history])
    _finish(left, right)
    return figure


def calibration(scored: Scored, label: int, name: str) -> Any:
    """Predicted against observed rates in 20 bins of equal size, per head."""
    figure, axis = plt.subplots(figsize=(5.2, 4.6))
    top = 0.0
    is_there = ~np.isnan(scored.labels[:, label])
    for number, (head, probabilities) in enumerate(scored.probabilities.items()):
        bins = metrics.calibration(
            scored.labels[is_there, label], probabilities[is_there, label], 20
        )
        axis.plot(bins.predicted, bins.observed, "o-", ms=4, color=colour(number), label=head)
        top = max(top, float(np.nanmax(bins.predicted)), float(np.nanmax(bins.observed)))
    axis.plot([0, top], [0, top], "--", color="#999999", label="perfect")
    axis.set(title=f"Calibration, {name}", xlabel="predicted rate", ylabel="observed rate")
    _finish(axis)
    return figure


def errors(scored: Scored, label: int, name: str) -> Any:
    """Predicted means against observed values of a rating, in 20 bins of equal size, per head."""
    figure, axis = plt.subplots(figsize=(5.2, 4.6))
    is_there = ~np.isnan(scored.labels[:, label])
    y = scored.labels[is_there, label].astype(np.float64)
    for number, (head, predictions) in enumerate(scored.probabilities.items()):
        p = predictions[is_there, label].astype(np.float64)
        parts = np.array_split(np.argsort(p, kind="stable"), min(20, len(p)))
        means = np.array([[p[own].mean(), y[own].mean()] for own in parts])
        axis.plot(means[:, 0], means[:, 1], "o-", ms=4, color=colour(number), label=head)
    low, high = float(means.min()), float(means.max())
    axis.plot([low, high], [low, high], "--", color="#999999", label="perfect")
    axis.set(title=f"Predicted and observed {name}", xlabel="predicted", ylabel="observed")
    _finish(axis)
    return figure


def agreement(scored: Scored, label: int, name: str) -> Any:
    """The student's probability against the teacher's, row by row."""
    figure, axis = plt.subplots(figsize=(5.2, 4.6))
    teacher = scored.probabilities["teacher"][:, label]
    student = scored.probabilities["student"][:, label]
    axis.hexbin(teacher, student, gridsize=45, bins="log", cmap="Blues", mincnt=1)
    axis.plot([0, 1], [0, 1], "--", color="#999999")
    correlation = float(np.corrcoef(teacher, student)[0, 1])
    axis.set(
        title=f"Student against teacher, {name} (r = {correlation:.3f})",
        xlabel="teacher's probability",
        ylabel="student's probability",
    )
    return figure


def pcoc_by_domain(parts: Mapping[str, Mapping[str, Mapping[str, float]]], label: str) -> Any:
    """PCOC of each domain and head of a label, with the rows beside: 1 promises what happens.

    Args:
      parts: head -> domain -> metrics.
      label: its name.
    """
    domains = sorted({d for heads in parts.values() for d in heads}, key=str)
    figure, axis = plt.subplots(figsize=(max(5.2, 0.7 * len(domains) * len(parts)), 3.4))
    width = 0.8 / len(parts)
    for number, (head, heads) in enumerate(parts.items()):
        values = [heads.get(d, {}).get("pcoc", np.nan) for d in domains]
        x = np.arange(len(domains)) + number * width
        bars = axis.bar(x, np.array(values, float), width, color=colour(number), label=head)
        axis.bar_label(bars, fmt="%.2f", fontsize=7)
    first = next(iter(parts.values()))
    names = [f"{d}\n{first.get(d, {}).get('rows', 0):,}" for d in domains]
    axis.set_xticks(np.arange(len(domains)) + 0.4 - width / 2, names, fontsize=8)
    axis.axhline(1, color="#999999", linestyle="--")
    axis.set(title=f"PCOC of {label} by domain (rows below)", ylabel="predicted / observed")
    _finish(axis)
    return figure


def size_and_latency(found: Mapping[str, Any]) -> Any:
    """Dense weights and forward latency of each head."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2))
    heads = list(found["parameters"])
    sizes_of_heads = [found["parameters"][h]["dense"] for h in heads]
    bars = left.barh(heads, sizes_of_heads, color=[colour(i) for i in range(len(heads))])
    left.bar_label(bars, labels=[f"{n:,}" for n in sizes_of_heads], fontsize=8, padding=2)
    left.set(title="Weights outside the tables")
    left.margins(x=0.2)
    sizes = list(found["latency_ms"][heads[0]])
    width = 0.8 / len(heads)
    for i, head in enumerate(heads):
        values = [found["latency_ms"][head][size]["p50"] for size in sizes]
        x = np.arange(len(sizes)) + i * width
        bars = right.bar(x, values, width, color=colour(i), label=head)
        right.bar_label(bars, fmt="%.2f", fontsize=7)
    right.set_xticks(np.arange(len(sizes)) + 0.4 - width / 2, [f"{s} rows" for s in sizes])
    right.set(title="Forward pass in this process, p50", ylabel="ms")
    _finish(left, right)
    return figure


def adaptation(curve: Mapping[str, Any], label: str) -> Any:
    """AUC and GAUC of the adapted and the plain tower, by support rows used."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    sizes = [int(k) for k in curve]
    for axis, metric in zip(axes, ("auc", "gauc"), strict=True):
        for number, (head, style) in enumerate((("adapted", "o-"), ("plain", "--"))):
            values = [curve[str(k)][head][label].get(metric, np.nan) for k in sizes]
            axis.plot(sizes, values, style, color=colour(number), label=head)
        axis.set(title=f"{metric.upper()} of {label}", xlabel="newest support rows used")
        axis.set_xticks(sizes)
    _finish(*axes)
    return figure


def labels_of(looks: Mapping[str, Summary]) -> Any:
    """The mean of each label in each data set."""
    labels = list(next(iter(looks.values())).labels)
    figure, axis = plt.subplots(figsize=(max(5.2, 1.3 * len(labels) * len(looks)), 3.2))
    width = 0.8 / len(looks)
    for number, (role, found) in enumerate(looks.items()):
        values = np.array([found.labels[label]["mean"] for label in labels], float)
        x, shown = np.arange(len(labels)) + number * width, f"{role}, {found.rows:,} rows"
        bars = axis.bar(x, values, width, color=colour(number), label=shown)
        axis.bar_label(bars, fmt="%.4g", fontsize=8)
    axis.set_xticks(np.arange(len(labels)) + 0.4 - width / 2, labels)
    axis.set(title="Labels: mean of each data set")
    axis.margins(y=0.2)
    _finish(axis)
    return figure


def histograms(looks: Mapping[str, Summary], drifts: Mapping[str, float]) -> Any:
    """Shares of the bins of those features that moved most, or that come first."""
    first, *others = looks.values()
    columns = [column for column in first.columns if column.histogram]
    columns.sort(key=lambda column: -drifts.get(column.name, 0.0))
    columns = columns[:_MAX_PICTURES]
    rows = -(-len(columns) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(11, 2.1 * rows), squeeze=False)
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    for axis, column in zip(axes.flat, columns, strict=False):
        _histogram(axis, [column, *(_of(other, column.name) for other in others)], list(looks))
        drift = f", PSI {drifts[column.name]:.3f}" if column.name in drifts else ""
        axis.set_title(f"{column.name}{drift}", fontsize=8)
    axes.flat[0].legend(frameon=False, fontsize=7)
    return figure


def _of(found: Summary, name: str) -> Column | None:
    return next((column for column in found.columns if column.name == name), None)


def _histogram(axis: Any, columns: Sequence[Column | None], roles: Sequence[str]) -> None:
    first = columns[0]
    assert first is not None
    width = 0.8 / len(columns)
    for number, column in enumerate(columns):
        if column is not None and column.edges == first.edges:
            x = np.arange(len(column.histogram)) + number * width
            axis.bar(x, column.histogram, width, color=colour(number), label=roles[number])
    if first.kind == "dense":
        names = [f"<{edge:.3g}" for edge in first.edges] + ["more", "none"]
    else:
        names = [str(value)[:8] for value in first.edges] + ["others"]
    shown = names if len(names) <= 12 else [n if i % 2 == 0 else "" for i, n in enumerate(names)]
    axis.set_xticks(np.arange(len(names)), shown, rotation=90, fontsize=6)
    axis.tick_params(axis="y", labelsize=6)
