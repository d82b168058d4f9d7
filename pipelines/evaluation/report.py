"""What a run shows a person: report.html with its pictures, and lines for the terminal."""

from __future__ import annotations

import base64
import html
import io
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed

import matplotlib.pyplot as plt
import numpy as np
import tensorflow as tf

from qianmo.export.saved_model import raw_specs
from qianmo.layers import metrics
from qianmo.layers.encode import example
from qianmo.models.ranker import Ranker
from qianmo.pipelines import run_dir
from qianmo.pipelines.evaluation import retrieval
from qianmo.pipelines.evaluation.scores import Scored, left_out, parts_of

COLOURS = {
    "student": "#0b6e99",
    "teacher": "#d9822b",
    "model": "#0b6e99",
    "adapted": "#0b6e99",
    "plain": "#999999",
}
TITLES = {"auc": "AUC", "ndcg_10": "NDCG@10"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
img { max-width: 100% } pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
.note { color: #666 }
"""


def epoch_line(entry: Mapping[str, Any]) -> str:
    """One line for the terminal about an epoch."""
    parts = [f"epoch {entry['epoch']}: loss {entry['train']['loss']:.4f}"]
    for head, labels in entry.get("valid", {}).items():
        for label, found in labels.items():
            name = "auc" if "auc" in found else "ndcg_10"
            parts.append(f"valid {head} {label} {TITLES[name]} {found[name]:.4f}")
    return ", ".join(parts)


def head_function(model: Ranker, head: str) -> Any:
    """A graph from raw features to one head's probabilities; nothing else is computed.

    It is one for all batch sizes.
    """

    @tf.function(input_signature=[raw_specs(model.schema)])
    def predict(features: Mapping[str, tf.Tensor]) -> tf.Tensor:
        return tf.sigmoid(model.one_head(features, head)[0].logits)

    return predict.get_concrete_function()


def parameters(model: Ranker) -> dict[str, dict[str, int]]:
    """Weights that each head's graph reads: those of the tables, and the dense ones."""
    tables = {v.ref() for v in model.embed.variables}
    found = {}
    for head in model.head_names:
        graph = head_function(model, head).graph
        sizes = {v.ref(): int(np.prod(v.shape)) for v in graph.variables}
        found[head] = {
            "tables": sum(n for ref, n in sizes.items() if ref in tables),
            "dense": sum(n for ref, n in sizes.items() if ref not in tables),
        }
    return found


def latency(
    model: Ranker, batch_sizes: tuple[int, ...] = (1, 64, 512), calls: int = 100
) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of each head's forward pass in this process: head -> batch size -> p50, p99."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for head in model.head_names:
        predict = head_function(model, head)
        found[head] = {}
        for size in batch_sizes:
            batch = example(model.schema, size)
            for _ in range(10):
                predict(batch)
            times = []
            for _ in range(calls):
                start = time.perf_counter()
                predict(batch).numpy()
                times.append((time.perf_counter() - start) * 1e3)
            found[head][str(size)] = {
                "p50": float(np.percentile(times, 50)),
                "p99": float(np.percentile(times, 99)),
            }
    return found


def picture(figure: Any, alt: str) -> str:
    """A figure as an element of HTML that holds it."""
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def _colour(head: str) -> str:
    return COLOURS.get(head, "#555555")


def curves(history: list[Mapping[str, Any]]) -> Any:
    """Training loss by its parts, and a validation metric by head, over epochs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    epochs = [entry["epoch"] for entry in history]
    for name in history[0]["train"]:
        left.plot(epochs, [e["train"][name] for e in history], marker="o", label=name)
    left.set(
        title="Training loss and its parts", xlabel="epoch", ylabel="nats a row", ylim=(0, None)
    )
    left.legend(frameon=False)
    if "valid" in history[0]:
        for head, labels in history[0]["valid"].items():
            for label, found in labels.items():
                metric = "auc" if "auc" in found else "ndcg_10"
                values = np.array([e["valid"][head][label][metric] for e in history], float)
                right.plot(
                    epochs, values, marker="o", color=_colour(head), label=f"{head}, {label}"
                )
        right.set(title=f"Validation {TITLES[metric]}", xlabel="epoch")
        right.legend(frameon=False)
    for axis in (left, right):
        axis.set_xticks(epochs)
        axis.grid(alpha=0.25)
    return figure


def calibration(scored: Scored, label: int, name: str) -> Any:
    """Predicted against observed rates in 20 bins of equal size, per head."""
    figure, axis = plt.subplots(figsize=(5.2, 4.6))
    top = 0.0
    for head, probabilities in scored.probabilities.items():
        bins = metrics.calibration(scored.labels[:, label], probabilities[:, label], 20)
        axis.plot(bins.predicted, bins.observed, "o-", ms=4, color=_colour(head), label=head)
        top = max(top, float(np.nanmax(bins.predicted)), float(np.nanmax(bins.observed)))
    axis.plot([0, top], [0, top], "--", color="#999999", label="perfect")
    axis.set(title=f"Calibration, {name}", xlabel="predicted rate", ylabel="observed rate")
    axis.legend(frameon=False)
    axis.grid(alpha=0.25)
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


def size_and_latency(found: Mapping[str, Any]) -> Any:
    """Dense weights and forward latency of each head."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2))
    heads = list(found["parameters"])
    colours = [_colour(h) for h in heads]
    left.barh(heads, [found["parameters"][h]["dense"] for h in heads], color=colours)
    left.set(title="Weights outside the tables")
    sizes = list(found["latency_ms"][heads[0]])
    for i, head in enumerate(heads):
        values = [found["latency_ms"][head][size]["p50"] for size in sizes]
        places = np.arange(len(sizes)) + i * 0.8 / len(heads)
        right.bar(places, values, 0.8 / len(heads), color=_colour(head), label=head)
    right.set_xticks(np.arange(len(sizes)) + 0.4 - 0.4 / len(heads), [f"{s} rows" for s in sizes])
    right.set(title="Forward pass in this process, p50", ylabel="ms")
    right.legend(frameon=False)
    return figure


def adaptation(curve: Mapping[str, Any], label: str) -> Any:
    """AUC and GAUC of the adapted and the plain tower, by support rows used."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8))
    sizes = [int(k) for k in curve]
    for axis, metric in zip(axes, ("auc", "gauc"), strict=True):
        for head, style in (("adapted", "o-"), ("plain", "--")):
            values = [curve[str(k)][head][label].get(metric, np.nan) for k in sizes]
            axis.plot(sizes, values, style, color=COLOURS[head], label=head)
        axis.set(title=f"{metric.upper()} of {label}", xlabel="newest support rows used")
        axis.set_xticks(sizes)
        axis.legend(frameon=False)
        axis.grid(alpha=0.25)
    return figure


def write_page(path: pathlib.Path, title: str, body: Sequence[str]) -> None:
    """Writes a page that needs no other file."""
    run_dir.write_text(
        path,
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><body>{''.join(body)}</body></html>\n",
    )


def _metrics_table(test: Mapping[str, Any]) -> str:
    rows = [
        "<tr><th>head, label, rows of</th><th>rows</th><th>AUC</th><th>GAUC</th>"
        "<th>log loss</th><th>PCOC</th></tr>"
    ]
    for head, label, name, m in parts_of(test):
        rows.append(
            f"<tr><td>{html.escape(f'{head}, {label}, {name}')}</td><td>{m['rows']:,}</td>"
            f"<td>{m['auc']:.4f}</td><td>{m.get('gauc', float('nan')):.4f}</td>"
            f"<td>{m['log_loss']:.4f}</td><td>{m['pcoc']:.3f}</td></tr>"
        )
    return f"<table>{''.join(rows)}</table><p class=note>{left_out(test)}</p>"


def write_html(path: pathlib.Path, found: Mapping[str, Any], scored: Scored | None) -> None:
    """Writes the report of a run: `found` is what report.json holds."""
    recipe = found["recipe"]
    name = recipe["model"]["name"]
    speed = found["history"][-1]["samples_per_second"] or float("nan")  # null in a short run
    body = [
        f"<h1>{html.escape(name)} on {html.escape(', '.join(recipe['schema']['labels']))}</h1>",
        f"<p>{found['rows']['train']:,} training rows, {len(found['history'])} epochs, "
        f"{speed:,.0f} samples/s in the last, peak memory "
        f"{found['peak_memory_bytes'] / 2**20:,.0f} MiB.</p>",
        picture(curves(found["history"]), "loss and AUC over epochs"),
    ]
    if scored is not None:
        body += ["<h2>Test rows</h2>", _metrics_table(found["test"])]
        for k, label in enumerate(recipe["schema"]["labels"]):
            body.append(picture(calibration(scored, k, label), f"calibration of {label}"))
            if "teacher" in scored.probabilities and len(scored.probabilities) > 1:
                body.append(picture(agreement(scored, k, label), "student against teacher"))
    elif "test" in found:
        text = html.escape(retrieval.table(found["test"]))
        body += ["<h2>Test rows: the item found among all</h2>", f"<pre>{text}</pre>"]
    if "adapted" in found:
        body += ["<h2>Adapted to each task</h2>", _metrics_table(found["adapted"]["test"])]
        for label in recipe["schema"]["labels"]:
            figure = adaptation(found["adapted"]["curve"], label)
            body.append(picture(figure, f"metrics of {label} by number of support rows"))
    body += [
        "<h2>Size and latency</h2>",
        picture(size_and_latency(found), "size and latency of each head"),
        "<h2>Recipe</h2>",
        '<p class="note">Data: '
        + ", ".join(f"{k} sha256 {v[:16]}…" for k, v in found["data_sha256"].items())
        + "</p>",
    ]
    features = [f["name"] for f in recipe["schema"]["features"]]
    shown = {"data": recipe["data"], "model": recipe["model"], "train": recipe["train"]}
    body.append(f"<p>Features: {html.escape(', '.join(features))}</p>")
    body.append(f"<pre>{html.escape(json.dumps(shown, indent=1))}</pre>")
    write_page(path, name, body)
