"""Exports a trained model for TensorFlow Serving.

    qianmo-export --model_dir=runs/dual --model_base_path=served/ranker

Reads a model directory, and rows to replay. Writes a version below --model_base_path.

The new version is written under a temporary name, replayed on real rows by the session loader,
compared with the Keras model, and only then published by a rename.
"""

from __future__ import annotations

import os
import pathlib
from typing import TYPE_CHECKING, Any

from absl import app, flags

from qianmo.export import paths
from qianmo.pipelines import program
from qianmo.pipelines.adapted import define_serving_flags

if TYPE_CHECKING:
    from qianmo.export.calibration import Calibration
    from qianmo.models.ranker import Ranker
    from qianmo.ops.support_store import SupportStore
    from qianmo.pipelines.recipe import Data

FORMS = ("adapted", "fed", "in_graph", "retrieval", "store")
DTYPES = ("float32", "float16", "bfloat16", "int8")


def _support_store(model: Ranker, values: Any) -> SupportStore | None:
    """The store that --support_store names, for rows of the model.

    Raises:
      ValueError: it cannot be opened.
    """
    import tensorflow as tf

    from qianmo.export.support_rows import kept
    from qianmo.ops.support_store import SupportStore

    where = values.support_store
    if not where or model.meta is None:  # without `meta` the export is refused
        return None
    try:
        return SupportStore(
            pathlib.Path(values.model_base_path).name,
            kept(model, values.support_keep).dim,
            len(model.schema.labels),
            model.meta.inner.max_support,
            path=where if "://" in where else os.path.abspath(where),
            ttl_seconds=values.support_ttl_seconds,
        )
    except tf.errors.FailedPreconditionError as error:
        raise ValueError(f"--support_store={where}: {error.message}") from error


def define_flags() -> None:
    """Defines this program's flags."""
    program.heading("The model and its versions")
    flags.DEFINE_string("model_dir", None, "Directory of a trained model.", required=True)
    flags.DEFINE_string(
        "model_base_path",
        None,
        "Where the versions go; its last part names the model.",
        required=True,
    )
    flags.DEFINE_enum(
        "form",
        "in_graph",
        FORMS,
        "in_graph: everything in one SavedModel. fed: the graph takes vectors as inputs, and a "
        "second SavedModel, <model_base_path>_lookup, makes them. adapted: in_graph with a tower "
        "that adapts to each task in the graph. retrieval: vectors of a two-tower model's users "
        "and items, and the items found for a user. Stock ops in all four, unless "
        "--support_store is given. store: the graph reads vectors from files by an op that the "
        "server must have linked in.",
    )
    flags.DEFINE_list(
        "heads", [], "Heads to ship, the default one first. Default: the model's serving head."
    )
    flags.DEFINE_integer("version", None, "Default: one above the highest there.", lower_bound=1)
    program.model_paths("model_dir", "model_base_path")
    program.heading("Rows to replay before publishing")
    flags.DEFINE_string("data", None, "Rows to replay. Default: the recipe's test or valid rows.")
    flags.DEFINE_integer("rows", 1000, "How many rows to replay.", lower_bound=1)
    program.heading("Calibration")
    flags.DEFINE_string(
        "calibrate",
        None,
        "Held-out rows, such as the validation rows: a scaling a z + b of the logits is fitted on "
        "them for each label and domain, and exported in the graph. PCOC before and after is "
        "printed, of --data too where it is given. Not for the form `retrieval`.",
    )
    program.heading("Form `adapted`")
    flags.DEFINE_string(
        "support",
        None,
        "Form `adapted`: support rows that its table starts with, or that the store gets besides "
        "what it has. Default: the recipe's.",
    )
    flags.DEFINE_string(
        "support_store",
        "",
        "Form `adapted`: where support lives beyond a version, instead of a table in the graph. A "
        "folder of the machine that serves, which one process at a time has open: export while no "
        "server does; or the URL of a Redis, redis://HOST:PORT/PREFIX for one, which all servers "
        "share. The server must have the store's op linked in.",
    )
    flags.DEFINE_enum(
        "support_keep",
        "hidden",
        ["hidden", "features"],
        "Form `adapted`, what a support row holds. hidden: the tower's input; fast. features: what "
        "the tower's input is made of anew in each request.",
    )
    define_serving_flags()
    flags.DEFINE_float(
        "support_ttl_seconds", 0.0, "Older support is not used; 0: for ever.", lower_bound=0.0
    )
    program.heading("Form `retrieval`")
    flags.DEFINE_string(
        "items", None, "Form `retrieval`: the catalogue, a row an item. Default: the recipe's."
    )
    flags.DEFINE_integer("best", 100, "Form `retrieval`: items found for a user.", lower_bound=1)
    program.heading("Form `store`")
    flags.DEFINE_string(
        "embedding_store",
        None,
        "Form `store`: folder of the embedding versions. Default: <model_base_path>_embeddings. "
        "With it, or with --redis, the graph that makes vectors for the form `fed` reads them "
        "there, and the flags below are for it as well.",
    )
    flags.DEFINE_string(
        "redis",
        "",
        "Form `store`: URL of a Redis, redis://HOST:PORT/PREFIX for one; then the embeddings are "
        "loaded into it as well, and the graph reads them there.",
    )
    flags.DEFINE_integer(
        "embedding_version",
        None,
        "Form `store`: a version there that holds the model's embeddings; then only the graph is "
        "written. Default: the embeddings are written as a new version, and published.",
        lower_bound=1,
    )
    flags.DEFINE_integer(
        "changes_of",
        None,
        "Form `store`: a version there that the model was trained on from; then only the rows that "
        "differ are written, and its graphs read them too.",
        lower_bound=1,
    )
    flags.DEFINE_enum(
        "embedding_dtype", "float32", DTYPES, "Form `store`: how new tables are stored."
    )
    flags.DEFINE_enum(
        "on_mismatch",
        "fall_back",
        ["fall_back", "refuse"],
        "Form `store`: what the graph does when embeddings are published that it was not made for: "
        "read the newest that it was made for, or refuse requests.",
    )
    flags.DEFINE_float(
        "tolerance",
        1e-6,
        "Form `store`: how far scores may be from the Keras model's. Only dtypes other than "
        "float32 need more than the default.",
        lower_bound=0.0,
    )


def run(_: list[str]) -> None:
    """Exports, and says where the version lies and how near the scores are."""
    values = flags.FLAGS
    if values.calibrate and values.form == "retrieval":
        raise app.UsageError("--calibrate is for scores; vectors of the form retrieval have none.")
    paths.check_folder(values.model_base_path)
    from qianmo.export.publishing import check_free
    from qianmo.pipelines import origin
    from qianmo.pipelines.evaluation import adapted
    from qianmo.pipelines.evaluation.measuring import changed_data

    check_free(values.model_base_path)
    model, recipe, told = origin.load(values.model_dir)
    model = adapted.as_served(model, values.inner_steps, values.min_support)
    for changed in changed_data(values.model_dir, recipe, *_unnamed(recipe.data, values)):
        print(f"note: {changed}")
    shared: dict[str, Any] = {"version": values.version, "origin": told}
    if values.calibrate:
        shared["calibration"] = _calibration(model, values, told)
    export = {"adapted": _export_adapted, "retrieval": _export_retrieval}
    folder, worst = export.get(values.form, _export_scores)(model, recipe.data, values, shared)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    print(f"{folder}: {size:,} bytes; largest difference to the Keras model {worst:.1e}")
    if recipe.train.dtype_policy.startswith("mixed_"):
        print(f"trained in {recipe.train.dtype_policy}; it serves in float32, as it was compared")


def _unnamed(data: Data, values: Any) -> list[str]:
    """Roles of the recipe's data sets that are read as no flag names others."""
    replayed = next(role for role in ("test", "valid", "train") if getattr(data, role))
    used = {replayed: values.data}
    if values.form == "adapted":
        used["test_support"] = values.support
    elif values.form == "retrieval":
        used["catalogue"] = values.items
    return [role for role, given in used.items() if not given]


def _replayed(data: Data, values: Any) -> str:
    return str(values.data or data.test or data.valid or data.train)


def _calibration(model: Ranker, values: Any, told: dict[str, Any]) -> Calibration:
    """Fits the scalings on the rows of --calibrate, prints PCOC, and notes both in the origin."""
    from qianmo.pipelines.data import identity
    from qianmo.pipelines.evaluation import calibration

    schema, path = model.schema, values.calibrate
    heads = () if values.form == "adapted" else values.heads  # it ships the serving head alone
    with identity.taking(schema, path) as taken:
        rows = calibration.logits(model, path, heads)
        own = taken.result()
        taken.check_unchanged()
    found = rows.fitted()
    told["calibration"] = {
        **own.to_config(),
        "scalings": {head: scaling.to_config(schema) for head, scaling in found.items()},
    }
    print(f"calibrated on {path}: {own}")
    if own.sha256 == told["data"].get("train", {}).get("sha256"):
        print("These are the training rows, which the model knows better than others: give others.")
    if schema.domain and schema.domain_feature is None:
        print(f"`{schema.domain}` is no feature with a vocabulary: one scaling for all domains.")
    print(calibration.table(rows, found))
    if values.data:
        print(f"\non {values.data}:")
        print(calibration.table(calibration.logits(model, values.data, heads), found))
    return found


def _export_adapted(
    model: Ranker, data: Data, values: Any, shared: dict[str, Any]
) -> tuple[pathlib.Path, float]:
    from qianmo.export.adapted import export_adapted
    from qianmo.pipelines.data import identity
    from qianmo.pipelines.data.replay import columns

    support = values.support or data.test_support
    if not support:
        raise ValueError("The recipe names no support rows; give --support.")
    with identity.taking(model.schema, support) as taken:
        rows = columns(model.schema, support)
        shared["origin"]["support"] = taken.result().to_config()
        taken.check_unchanged()
    store = _support_store(model, values)
    try:
        return export_adapted(
            model,
            values.model_base_path,
            columns(model.schema, _replayed(data, values), values.rows),
            rows,
            store=store,
            keep=values.support_keep,
            ttl_seconds=values.support_ttl_seconds,
            **shared,
        )
    finally:
        if store is not None:
            store.close()


def _export_retrieval(
    model: Ranker, data: Data, values: Any, shared: dict[str, Any]
) -> tuple[pathlib.Path, float]:
    from qianmo.export.retrieval import export_retrieval
    from qianmo.models.two_tower import TwoTower
    from qianmo.pipelines.data import identity
    from qianmo.pipelines.data.replay import first_rows
    from qianmo.pipelines.evaluation import retrieval

    items = values.items or data.catalogue
    if not isinstance(model, TwoTower) or not items:
        raise ValueError("Form retrieval needs a two-tower model, and --items.")
    with identity.taking(retrieval.item_schema(model.schema), items, targets=False) as taken:
        rows = retrieval.item_rows(model, items)
        shared["origin"]["catalogue"] = taken.result().to_config()
        taken.check_unchanged()
    return export_retrieval(
        model,
        values.model_base_path,
        first_rows(model.schema, _replayed(data, values), values.rows),
        rows,
        best=values.best,
        **shared,
    )


def _export_scores(
    model: Ranker, data: Data, values: Any, shared: dict[str, Any]
) -> tuple[pathlib.Path, float]:
    from qianmo.export.saved_model import export_fed, export_in_graph
    from qianmo.export.store import export_fed_store, export_store
    from qianmo.pipelines.data.replay import first_rows

    options: dict[str, Any] = {}
    export = {"in_graph": export_in_graph, "fed": export_fed, "store": export_store}[values.form]
    if values.form == "fed" and (values.embedding_store or values.redis):
        export = export_fed_store
    if export in (export_store, export_fed_store):
        options = {
            "store": values.embedding_store,
            "embedding_version": values.embedding_version,
            "changes_of": values.changes_of,
            "dtype": values.embedding_dtype,
            "on_mismatch": values.on_mismatch,
            "redis": values.redis,
            "tolerance": values.tolerance,
        }
    return export(
        model,
        values.model_base_path,
        first_rows(model.schema, _replayed(data, values), values.rows),
        heads=values.heads,
        **options,
        **shared,
    )


def main() -> None:
    """Entry of `qianmo-export`."""
    program.start(define_flags, run)


if __name__ == "__main__":
    main()
