"""The steps of the demo: the main job end to end on real data."""

from __future__ import annotations

import contextlib
import io
import pathlib
import shutil
import time
from typing import Any

import numpy as np

from qianmo.configs import kuairand_domains, kuairand_dual_dnn, kuairand_meta
from qianmo.configs.base import point
from qianmo.export import paths
from qianmo.export.adapted import ADAPT, adapted_specs, export_adapted
from qianmo.export.saved_model import cast, export_in_graph, session
from qianmo.models.ranker import Ranker
from qianmo.pipelines import origin, run_dir
from qianmo.pipelines.data.replay import columns, first_rows
from qianmo.pipelines.datasets import kuairand
from qianmo.pipelines.evaluation import adapted, compare, report
from qianmo.pipelines.evaluation.cost import size_of
from qianmo.pipelines.recipe import Recipe
from qianmo.pipelines.serving.clients import Client, RestClient
from qianmo.pipelines.serving.server import ModelServer
from qianmo.pipelines.training.run import train

ROWS = 1000
STEPS = 7
# Passes over the training rows, after which models of five tabs or one are best on later days.
PASSES = {
    "cross_domain": 3,
    "single_1": 3,
    "single_0": 3,
    "single_4": 4,
    "single_6": 5,
    "single_2": 6,
}
TOLERANCE = 1e-6


def step(number: int, text: str) -> None:
    """Announces a step."""
    print(f"\n[{number}/{STEPS}] {text}", flush=True)


def recipe(variant: str, data: pathlib.Path, epochs: int) -> Recipe:
    """The KuaiRand recipe on the prepared rows."""
    config = kuairand_dual_dnn.get_config(variant)
    point(config, data)
    config.train.epochs = epochs
    return Recipe.from_config(config.to_dict())


def timed_requests(
    client: Client, rows: dict[str, np.ndarray], batch_size: int, requests: int
) -> tuple[np.ndarray, float]:
    """Milliseconds of each request, and rows/s."""
    batches = [
        {k: v[start : start + batch_size] for k, v in rows.items()}
        for start in range(0, len(next(iter(rows.values()))) - batch_size + 1, batch_size)
    ]
    for batch in batches[:3]:
        client.predict(batch)
    times = []
    begin = time.perf_counter()
    for i in range(requests):
        start = time.perf_counter()
        client.predict(batches[i % len(batches)])
        times.append((time.perf_counter() - start) * 1e3)
    return np.asarray(times), requests * batch_size / (time.perf_counter() - begin)


def run(output: pathlib.Path, epochs: int) -> None:
    """Runs the demo in a folder, which is emptied first."""
    paths.check_model_path(output)
    paths.check_folder(output)
    if output.exists():
        if any(output.iterdir()) and not (output / "data").is_dir():
            raise ValueError(f"{output} holds something else than a demo; give another --output.")
        shutil.rmtree(output)
    begin = time.perf_counter()
    data = output / "data"
    step(1, "Prepare: KuaiRand's standard log, split by day")
    kuairand.kuairand(None, data)

    step(2, "Train: a CIN teacher and its student in one pass, then the student alone")
    runs = {
        name: train(recipe(name, data, epochs), output / name) for name in ("dual", "student_alone")
    }

    step(3, "Export: three SavedModels of stock ops, replayed against Keras before publishing")
    dual, _, of_dual = origin.load(output / "dual")
    alone, _, of_alone = origin.load(output / "student_alone")
    rows = first_rows(dual.schema, str(data / "test.parquet"), ROWS)
    shipped: dict[str, tuple[Ranker, str]] = {
        "teacher": (dual, "teacher"),
        "student": (dual, "student"),
        "student_alone": (alone, "student"),
    }
    folders = {}
    for name, (model, head) in shipped.items():
        folders[name], worst = export_in_graph(
            model,
            output / "served" / name,
            rows,
            heads=(head,),
            origin=of_alone if model is alone else of_dual,
        )
        print(f"  {folders[name]}: {size_of(folders[name]):,} bytes, {worst:.1e} from Keras")

    step(4, f"Serve, and score {ROWS:,} real rows by gRPC and by REST")
    table: list[dict[str, Any]] = []
    with ModelServer(
        {name: str(path.parent) for name, path in folders.items()}, port=0, rest_api_port=0
    ) as server:
        print(f"  gRPC 127.0.0.1:{server.port}, REST 127.0.0.1:{server.rest_port}")
        for name, (model, head) in shipped.items():
            client = Client(f"127.0.0.1:{server.port}", name)
            rest = RestClient(f"127.0.0.1:{server.rest_port}", name)
            keras = report.head_function(model, head)(rows).numpy()
            for way, answer in (("gRPC", client.predict(rows)), ("REST", rest.predict(rows))):
                served = np.stack([answer[label] for label in model.schema.labels], 1)
                worst = float(np.abs(served - keras).max())
                print(f"  {name} by {way}: largest difference to Keras {worst:.1e}")
                if not worst <= TOLERANCE:
                    raise ValueError(f"{name} by {way} differs from Keras by {worst}")
            one, _ = timed_requests(client, rows, 1, 300)
            _, rows_per_second = timed_requests(client, rows, 500, 40)
            found = runs["student_alone" if name == "student_alone" else "dual"]
            metrics = found["test"][head][model.schema.labels[0]]["all"]
            table.append(
                {
                    "name": name,
                    "auc": metrics["auc"],
                    "gauc": metrics["gauc"],
                    "weights": found["parameters"][head]["dense"],
                    "bytes": size_of(folders[name]),
                    "p50": float(np.percentile(one, 50)),
                    "p99": float(np.percentile(one, 99)),
                    "rows_per_second": rows_per_second,
                }
            )

    step(5, "The result, on the test day")
    print(format_table(table))
    run_dir.write_json(output / "demo.json", table)

    step(6, "A tower that adapts to each user's own last rows, within the served graph")
    adapt(output, data, epochs)

    step(7, "Five tabs in one model with experts of their own, beside one model for each tab")
    fuse(output, data)
    reports = [output / name / "report.html" for name in ("dual", "meta")]
    print("\nReports:", *reports, output / "comparison.html")
    print(f"Took {time.perf_counter() - begin:.0f} s.")


def adapt(output: pathlib.Path, data: pathlib.Path, epochs: int) -> None:
    """Trains a meta tower on the same clicks, serves it, and says what adaptation brings."""
    config = kuairand_meta.get_config("kuairand_no_id-meta")
    point(config, data)
    config.train.epochs = epochs
    found = train(Recipe.from_config(config.to_dict()), output / "meta")
    model, _, of_run = origin.load(output / "meta")
    rows = columns(model.schema, str(data / "test.parquet"), ROWS)
    support = columns(model.schema, str(data / "test_support.parquet"))
    folder, worst = export_adapted(model, output / "served" / "meta", rows, support, origin=of_run)
    print(f"  {folder}: {size_of(folder):,} bytes, {worst:.1e} from Keras, plain and adapted")
    inputs = cast({**rows, ADAPT: np.ones(ROWS, bool)}, adapted_specs(model.schema))
    with session(folder) as run:
        expected = run("adapted", inputs)
    with ModelServer({"meta": str(folder.parent)}, port=0, rest_api_port=0) as server:
        answer = Client(f"127.0.0.1:{server.port}", "meta").predict(inputs, "adapted")
    for label in model.schema.labels:
        difference = float(np.abs(answer[label] - expected[label]).max())
        print(f"  adapted by gRPC: largest difference to the replayed graph {difference:.1e}")
        if not difference <= TOLERANCE:
            raise ValueError(f"The adapted scores by gRPC differ by {difference}")
        print(adapted.curve_table(found["adapted"]["curve"], label))


def fuse(output: pathlib.Path, data: pathlib.Path) -> None:
    """Trains a model of five tabs and one of each, and says what fusing costs and brings."""
    for name, passes in PASSES.items():
        config = kuairand_domains.get_config(name)
        config.data.valid = config.data.test = ""  # they are compared below
        point(config, data)
        config.train.epochs = passes
        config.train.steps_per_call = 1  # whose graph is made in half the time
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            found = train(Recipe.from_config(config.to_dict()), output / name)
        loss = found["history"][-1]["train"]["loss"]
        print(f"  {name}: {passes} passes over {found['rows']['train']:,} rows, loss {loss:.4f}")
    fused, *singles = (str(output / name) for name in PASSES)
    compared = compare.compare(fused, singles, str(data / "test.parquet"))
    compare.write(output / "comparison.html", compared)
    print(compare.table(compared))


def format_table(rows: list[dict[str, Any]]) -> str:
    """The demo's table as text."""
    lines = [
        f"{'':<15}{'AUC':>8}{'GAUC':>8}{'dense weights':>15}{'bytes':>13}"
        f"{'p50 ms':>9}{'p99 ms':>9}{'rows/s':>10}"
    ]
    for r in rows:
        lines.append(
            f"{r['name']:<15}{r['auc']:>8.4f}{r['gauc']:>8.4f}{r['weights']:>15,}{r['bytes']:>13,}"
            f"{r['p50']:>9.2f}{r['p99']:>9.2f}{r['rows_per_second']:>10,.0f}"
        )
    lines.append("(p50, p99: gRPC requests of one row, one client; rows/s: requests of 500 rows)")
    return "\n".join(lines)
