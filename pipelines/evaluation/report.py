"""What a run shows a person: report.html, and lines for the terminal."""

from __future__ import annotations

import html
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from qianmo.export.saved_model import raw_specs
from qianmo.layers.encode import example
from qianmo.layers.label_heads import predictions
from qianmo.models.ranker import Ranker
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import summaries
from qianmo.pipelines.evaluation import pictures, retrieval
from qianmo.pipelines.evaluation.pictures import picture
from qianmo.pipelines.evaluation.scores import (
    COLUMNS,
    FEWEST_ROWS,
    Scored,
    kind_of,
    left_out,
    parts_of,
)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
img { max-width: 100% } pre { background: #f6f6f6; padding: 1rem; overflow-x: auto }
.note { color: #666 } .warning { color: #b00020 } code { font-size: .85em }
"""


def epoch_line(entry: Mapping[str, Any]) -> str:
    """One line for the terminal about an epoch."""
    parts = [f"epoch {entry['epoch']}: loss {entry['train']['loss']:.4f}"]
    for head, labels in entry.get("valid", {}).items():
        for label, found in labels.items():
            name = pictures.headline(found)
            parts.append(f"valid {head} {label} {pictures.TITLES[name]} {found[name]:.4f}")
    return ", ".join(parts)


def head_function(model: Ranker, head: str) -> Any:
    """A graph from raw features to one head's predictions; nothing else is computed.

    It is one for all batch sizes.
    """

    @tf.function(input_signature=[raw_specs(model.schema)])
    def predict(features: Mapping[str, tf.Tensor]) -> tf.Tensor:
        return predictions(model.schema, model.one_head(features, head)[0].logits)

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


def page(title: str, body: Sequence[str]) -> str:
    """A page of HTML that needs no other file."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def _metrics_table(test: Mapping[str, Any]) -> str:
    found = ""
    for kind, columns in COLUMNS.items():
        parts = [part for part in parts_of(test) if kind_of(part[3]) == kind]
        if not parts:
            continue
        titles = "".join(f"<th>{title}</th>" for title, _, _ in columns.values())
        rows = [f"<tr><th>head, label, rows of</th>{titles}</tr>"]
        for head, label, name, m in parts:
            cells = "".join(
                f"<td>{m.get(key, float('nan')):{shown}}</td>"
                for key, (_, _, shown) in columns.items()
            )
            rows.append(f"<tr><td>{html.escape(f'{head}, {label}, {name}')}</td>{cells}</tr>")
        found += f"<table>{''.join(rows)}</table>"
    return f"{found}<p class=note>{left_out(test)}</p>"


def data_section(
    data: Mapping[str, Mapping[str, Any]],
    looks: Mapping[str, summaries.Summary],
    drifts: Mapping[str, float],
) -> list[str]:
    """What the rows are: identities, warnings, labels, features, as elements of HTML.

    Args:
      data: role -> identity of the data set.
      looks: role -> what was found in it.
      drifts: feature -> population stability index of the last of them against the first.
    """
    rows = "".join(
        f"<tr><td>{html.escape(role)}</td><td>{html.escape(each['path'])}</td>"
        f"<td>{each['rows']:,}</td><td><code>{each['sha256'][:16]}</code></td></tr>"
        for role, each in data.items()
    )
    body = [
        "<h2>Data</h2><table><tr><th>part</th><th>path</th><th>rows</th><th>sha256</th></tr>",
        f"{rows}</table>",
    ]
    for role, found in looks.items():
        for warning in found.warnings:
            body.append(f"<p class=warning>{html.escape(role)}: {html.escape(warning)}</p>")
    if looks:
        body.append(picture(pictures.labels_of(looks), "mean of each label in each data set"))
        body.append(picture(pictures.histograms(looks, drifts), "histograms of features"))
        body.append("<details><summary>Every feature</summary>")
        for role, found in looks.items():
            body.append(f"<pre>{html.escape(f'{role}: {summaries.table(found)}')}</pre>")
        body.append("</details>")
    return body


def _label_section(scored: Scored, k: int, label: str, found: Mapping[str, Any]) -> list[str]:
    if kind_of(next(iter(found["test"].values()))[label]["all"]) == "rating":
        return [picture(pictures.errors(scored, k, label), f"predicted and observed {label}")]
    body = [picture(pictures.calibration(scored, k, label), f"calibration of {label}")]
    if "teacher" in scored.probabilities and len(scored.probabilities) > 1:
        body.append(picture(pictures.agreement(scored, k, label), "student against teacher"))
    domains = {
        head: {d: m for d, m in labels[label]["domain"].items() if m["rows"] >= FEWEST_ROWS}
        for head, labels in found["test"].items()
        if "domain" in labels[label]
    }
    if domains:
        body.append(picture(pictures.pcoc_by_domain(domains, label), f"PCOC of {label} by domain"))
    return body


def write_html(path: pathlib.Path, found: Mapping[str, Any], scored: Scored | None) -> None:
    """Writes the report of a run: `found` is what report.json holds."""
    recipe = found["recipe"]
    name = recipe["model"]["name"]
    labels = recipe["schema"]["labels"]
    speed = found["history"][-1]["samples_per_second"] or float("nan")  # null in a short run
    looks = {role: summaries.Summary.from_config(config) for role, config in found["look"].items()}
    body = [
        f"<h1>{html.escape(name)} on {html.escape(', '.join(labels))}</h1>",
        f"<p>{found['rows']['train']:,} training rows, {len(found['history'])} epochs, "
        f"{speed:,.0f} samples/s in the last, peak memory "
        f"{found['peak_memory_bytes'] / 2**20:,.0f} MiB.</p>",
        picture(pictures.curves(found["curve"], found["history"]), "loss and metrics over steps"),
        *data_section(found["data"], looks, found.get("drift", {})),
    ]
    if scored is not None:
        body += ["<h2>Test rows</h2>", _metrics_table(found["test"])]
        for k, label in enumerate(found["test_labels"]):
            body += _label_section(scored, k, label, found)
    elif "test" in found:
        text = html.escape(retrieval.table(found["test"]))
        body += ["<h2>Test rows: the item found among all</h2>", f"<pre>{text}</pre>"]
    if "adapted" in found:
        body += ["<h2>Adapted to each task</h2>", _metrics_table(found["adapted"]["test"])]
        for label in found["test_labels"]:
            figure = pictures.adaptation(found["adapted"]["curve"], label)
            body.append(picture(figure, f"metrics of {label} by number of support rows"))
    body += [
        "<h2>Size and latency</h2>",
        picture(pictures.size_and_latency(found), "size and latency of each head"),
        "<h2>Recipe</h2>",
    ]
    features = [f["name"] for f in recipe["schema"]["features"]]
    shown = {"data": recipe["data"], "model": recipe["model"], "train": recipe["train"]}
    body.append(f"<p>Features: {html.escape(', '.join(features))}</p>")
    body.append(f"<pre>{html.escape(json.dumps(shown, indent=1))}</pre>")
    run_dir.write_text(path, page(name, body))
