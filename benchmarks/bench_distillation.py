"""The dual DNN and its relatives on MovieLens-1M's random split, paired by seed.

All runs of a seed start from the same tables, teacher and student and read the rows in the same
order, so differences between them are differences between methods. A student of a dual DNN leaves
no trace on tables and teacher, so all of a seed learn in one run beside one teacher; that teacher
is held, bit for bit, against one trained alone. Finished runs are kept in
runs/benchmarks/distillation.partial.json, from which a benchmark that was killed goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import common
import numpy as np
import tensorflow as tf
import tf_keras
from ml_collections import ConfigDict

from qianmo.configs import movielens_1m_distillation as recipes
from qianmo.layers import metrics
from qianmo.layers.embed import Embedded
from qianmo.layers.tower import TowerOutput
from qianmo.models.dual_dnn import DualDNN
from qianmo.models.ranker import Ranker, Targets
from qianmo.pipelines import run_dir
from qianmo.pipelines.data import readers, statistics
from qianmo.pipelines.evaluation.scores import score
from qianmo.pipelines.recipe import Recipe, optimizer
from qianmo.pipelines.training import runtime

PARTIAL = common.CACHE / "distillation.partial.json"
WEIGHTS = common.CACHE / "distillation_weights"

Units = tuple[int, ...]
# Shown name -> (variant, passes over the training rows). Stages share the passes.
METHODS = {
    "the teacher, alone": ("teacher_alone", 1),
    "the teacher, alone, two passes": ("teacher_alone", 2),
    "student alone, own embeddings": ("student_alone", 1),
    "shared embeddings, no KD": ("shared", 1),
    "soft labels": ("soft_labels", 1),
    "logit MSE": ("logit_mse", 1),
    "probability MSE": ("constant", 1),
    "probability MSE, warm-up (dual)": ("dual", 1),
    "hints": ("hints", 1),
    "dual + hints": ("dual_hints", 1),
    "Rocket Launching": ("rocket", 1),
    "two-stage, half a pass each": ("two_stage", 1),
    "DeepFM of that MLP, no teacher": ("deepfm", 1),
    "student alone, own embeddings, two passes": ("student_alone", 2),
    "shared embeddings, no KD, two passes": ("shared", 2),
    "probability MSE, warm-up (dual), two passes": ("dual", 2),
    "two-stage, one pass each": ("two_stage", 2),
}
TEACHER, ALONE, SHARED = (
    "the teacher, alone",
    "student alone, own embeddings",
    "shared embeddings, no KD",
)
DUAL = "probability MSE, warm-up (dual)"
LEAST_GAP = 0.002  # of AUC; a share of less is noise
PASSES = {1: "", 2: ", two passes"}
TOGETHER = ("shared", "soft_labels", "logit_mse", "constant", "dual", "hints", "dual_hints")
CIN_METHODS = (ALONE, SHARED, "probability MSE", DUAL, "hints")
CIN_SEEDS = (1, 2, 3)  # a run with CIN takes minutes
CIN_TOGETHER = ("shared", "constant", "dual", "hints")


class Together(Ranker):
    """Students of one teacher in one run, each with the loss of its own dual DNN."""

    def __init__(self, models: Mapping[str, DualDNN]) -> None:
        first = next(iter(models.values()))
        super().__init__(first.schema)
        for model in models.values():
            model.encode, model.embed = first.encode, first.embed
            model.bottom, model.tower = first.bottom, first.tower
        self.encode, self.embed = first.encode, first.embed
        self.bottom, self.tower = first.bottom, first.tower
        self.students = dict(models)
        self.head_names = ("teacher", *models)
        self.serving_head = "teacher"

    def heads(
        self, embedded: Embedded, names: Sequence[str], training: bool = False
    ) -> dict[str, TowerOutput]:
        """Computes the teacher, once, and all students."""
        found = self.students[self.head_names[1]].heads(embedded, ("teacher",), training)
        for name, model in self.students.items():
            found[name] = model.heads(embedded, ("student",), training)["student"]
        return found

    def loss_terms(self, heads: Mapping[str, TowerOutput], targets: Targets) -> dict[str, Any]:
        """The terms of every student, and the teacher's own once."""
        found = {}
        for name, model in self.students.items():
            pair = {"teacher": heads["teacher"], "student": heads[name]}
            for term, value in model.loss_terms(pair, targets).items():
                found[term if term == "teacher_loss" else f"{name} {term}"] = value
        return found


def prepare(model: Ranker, recipe: Recipe) -> None:
    """Compiles as `Run` does."""
    model.compile(
        optimizer(recipe.train.optimizer, "train.optimizer"),
        optimizer(recipe.train.table_optimizer, "train.table_optimizer"),
        steps_per_execution=recipe.train.steps_per_call,
    )


def fit(model: Ranker, recipe: Recipe, first: float = 0, passes: float = 1) -> None:
    """Trains as `Run` does, without its reports: rows from pass `first` on, for some passes."""
    train = recipe.train
    rows = readers.count_rows(recipe.schema, recipe.data.train)
    per_pass = math.ceil(rows / train.batch_size)
    step, end = round(first * per_pass), round((first + passes) * per_pass)
    while step < end:
        epoch, batch = divmod(step, per_pass)
        count = min(per_pass - batch, end - step)
        data = readers.dataset(
            recipe.schema,
            recipe.data.train,
            batch_size=train.batch_size,
            seed=train.seed,
            epoch=epoch,
            shuffle_rows=recipe.data.shuffle_rows,
            skip_batches=batch,
        )
        model.fit(data, steps_per_epoch=count, verbose=0)
        step += count


def aucs(model: Ranker, path: str) -> dict[str, float]:
    """AUC of each head."""
    scored = score(model, path)
    return {
        head: metrics.auc(scored.labels[:, 0], p[:, 0]) for head, p in scored.probabilities.items()
    }


def teacher_parts(model: Any) -> tf.train.Checkpoint:
    """Tables and teacher, without the optimisers' state."""
    return tf.train.Checkpoint(embed=model.embed, bottom=model.bottom, tower=model.tower)


def teacher_sha256(model: Any) -> str | None:
    """Of the bytes of all tables' and teacher's weights."""
    if model.tower is None:
        return None
    digest = hashlib.sha256()
    for part in (model.embed, model.bottom, model.tower):
        for variable in part.variables:
            digest.update(variable.numpy().tobytes())
    return digest.hexdigest()


class Runs:
    """The runs asked for, each done once."""

    def __init__(self, folder: pathlib.Path, part: str = "test", *, keep: bool = True) -> None:
        runtime.settle()
        self.folder, self.part, self.keep = folder, part, keep
        self.data = common.sha256(folder)
        config = common.point(recipes.get_config(), folder, valid=False)
        schema = Recipe.from_config(config.to_dict()).schema
        self.schema = statistics.complete(schema, config.data.train).to_config()
        self.done = run_dir.read_json(PARTIAL, {}) if keep else {}

    def _config(self, variant: str, teacher: str, units: Units, seed: int) -> ConfigDict:
        config = common.point(recipes.get_config(variant, teacher, units), self.folder, valid=True)
        config.schema = self.schema
        config.train.seed = seed
        return config

    def _once(
        self, name: str, passes: float, configs: Sequence[ConfigDict], work: Callable[[], Any]
    ) -> dict[str, Any]:
        said = {
            "models": [config.model.to_dict() for config in configs],
            "train": configs[0].train.to_dict(),
            "passes": float(passes),
            "part": self.part,
            "data": self.data,
        }
        key = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        if key not in self.done:
            start = time.perf_counter()
            tf_keras.backend.clear_session()
            self.done[key] = {"name": name, **work()}
            print(name, self.done[key]["auc"], f"{time.perf_counter() - start:.0f} s", flush=True)
            if self.keep:
                run_dir.write_json(PARTIAL, self.done)
        return dict(self.done[key])

    def teacher_weights(self, teacher: str, seed: int, passes: float) -> str:
        """A checkpoint of `teacher_parts` of a teacher trained alone, made if there is none."""
        path = WEIGHTS / f"{teacher}_{seed}_{passes}"
        if not path.with_suffix(".index").exists():
            recipe = Recipe.from_config(self._config("teacher_alone", teacher, (), seed).to_dict())
            model = run_dir.build(recipe)
            prepare(model, recipe)
            fit(model, recipe, passes=passes)
            teacher_parts(model).write(str(path))
        return str(path)

    def separate(
        self, variant: str, passes: float, teacher: str, units: Units, seed: int
    ) -> dict[str, Any]:
        """One recipe: AUC of each head, hash of the teacher's weights."""
        config = self._config(variant, teacher, units, seed)
        recipe = Recipe.from_config(config.to_dict())

        def work() -> dict[str, Any]:
            first = 0.0
            if variant == "two_stage":
                first = passes / 2
                weights = self.teacher_weights(teacher, seed, first)
            model = run_dir.build(recipe)
            if first:
                teacher_parts(model).read(weights).assert_consumed()
            prepare(model, recipe)
            fit(model, recipe, first, passes - first)
            if variant == "teacher_alone":
                teacher_parts(model).write(str(WEIGHTS / f"{teacher}_{seed}_{float(passes)}"))
            return {"auc": aucs(model, config.data[self.part]), "teacher": teacher_sha256(model)}

        return self._once(f"{variant} {units} {teacher} seed {seed}", passes, [config], work)

    def together(
        self, variants: Sequence[str], passes: int, teacher: str, sizes: Sequence[Units], seed: int
    ) -> dict[str, Any]:
        """Students of one teacher; AUC by head and pass, hash of its weights after the first."""
        members = {
            f"{variant} {units}": self._config(variant, teacher, units, seed)
            for variant in variants
            for units in sizes
        }
        recipe = Recipe.from_config(next(iter(members.values())).to_dict())

        def work() -> dict[str, Any]:
            models = {
                name: run_dir.build(Recipe.from_config(config.to_dict()))
                for name, config in members.items()
            }
            model = Together(models)
            prepare(model, recipe)
            for each in models.values():
                each.compile(model.optimizer, model.table_optimizer)  # the warm-up reads the step
            found: dict[str, Any] = {"auc": {}}
            for i in range(passes):
                fit(model, recipe, i)
                if i == 0:
                    found["teacher"] = teacher_sha256(model)
                scores = aucs(model, getattr(recipe.data, self.part))
                found["auc"] |= {f"{head} {i + 1}": value for head, value in scores.items()}
            return found

        return self._once(f"together {teacher} seed {seed}", passes, list(members.values()), work)


def one(values: np.ndarray, digits: int = 4) -> str:
    """A single run's value as text."""
    return f"{values[0]:.{digits}f}"


def table(
    runs: Runs,
    teacher: str,
    sizes: Sequence[Units],
    methods: Sequence[str],
    variants: Sequence[str],
    seeds: Mapping[int, Sequence[int]],
    checked: Sequence[int],
) -> tuple[list[dict[str, Any]], dict[Units, dict[str, Any]], int]:
    """Rows of one teacher; AUC by student and method; how many of the teachers were disturbed.

    Args:
      runs: where runs are made.
      teacher: its name in the recipes.
      sizes: the students.
      methods: rows.
      variants: recipes whose students learn together.
      seeds: number of passes -> seeds of the runs that take so many.
      checked: seeds whose teacher is also trained alone.
    """
    groups = {
        seed: runs.together(
            variants, max(i for i in seeds if seed in seeds[i]), teacher, sizes, seed
        )
        for seed in seeds[1]
    }
    disturbed = sum(
        runs.separate("teacher_alone", 1, teacher, (), seed)["teacher"] != groups[seed]["teacher"]
        for seed in checked
    )
    rows, found = [], {}
    teacher_auc = {
        TEACHER + PASSES[i]: np.array([groups[seed]["auc"][f"teacher {i}"] for seed in those])
        for i, those in seeds.items()
    }
    for units in sizes:
        auc = dict(teacher_auc)
        teachers = {}
        for method in methods:
            variant, count = METHODS[method]
            if variant in variants:
                values = [groups[s]["auc"][f"{variant} {units} {count}"] for s in seeds[count]]
            else:
                results = [
                    runs.separate(variant, count, teacher, units, s)["auc"] for s in seeds[count]
                ]
                values = [r.get("student", r.get("model")) for r in results]
                if variant in ("rocket", "two_stage"):
                    teachers[method] = common.shown([r["teacher"] for r in results])
            auc[method] = np.array(values)
        closed = {}
        for method, values in auc.items():
            # Against the ends of the gap, and the student without KD, after as many passes.
            count = METHODS[method][1]
            floor, shared, top = (auc[m + PASSES[count]] for m in (ALONE, SHARED, TEACHER))
            closed[method] = 100 * (values - floor) / (top - floor)
            shown = common.shown if len(values) > 1 else one
            has_gap = (top - floor).mean() >= LEAST_GAP
            gain = values - shared
            is_shared = method == SHARED + PASSES[count]
            rows.append(
                {
                    "teacher": {"bi": "MLP + bi-interaction + FM", "cin": "MLP + CIN"}[teacher],
                    "student": "-".join(map(str, units)),
                    "method": method,
                    "passes": count,
                    "seeds": len(values),
                    "AUC": shown(values),
                    "gap closed, %": shown(closed[method], 0) if has_gap else "no gap",
                    "gain over no KD": "" if is_shared else shown(gain),
                    "least gain of a seed": "" if is_shared else f"{gain.min():+.4f}",
                    "AUC of its teacher": teachers.get(method, ""),
                }
            )
        found[units] = {"auc": auc, "closed": closed}
    return rows, found, disturbed


def run(*, quick: bool) -> dict[str, Any]:
    """Both teachers."""
    runs = Runs(common.movielens_1m("random"), keep=not quick)
    small: Units = (16,)
    seeds = {1: (1,)} if quick else {1: (1, 2, 3, 4, 5), 2: (1, 2, 3)}
    methods = [ALONE, SHARED, DUAL] if quick else [m for m in METHODS if TEACHER not in m]
    variants = ("shared", "dual") if quick else TOGETHER
    rows, found, disturbed = table(runs, "bi", [small], methods, variants, seeds, seeds[1])
    auc, closed = found[small]["auc"], found[small]["closed"]
    # The recipe itself, student and teacher, once more without company.
    own = runs.separate("dual", 1, "bi", small, 1)
    disturbed += own["teacher"] != runs.separate("teacher_alone", 1, "bi", (), 1)["teacher"]

    def least(method: str, other: str) -> float:
        return float((auc[method] - auc[other]).min())

    targets = {
        "MLP(16): % of the gap that the dual DNN closes": common.target(
            float(closed[DUAL].mean()), 55
        ),
        "MLP(16): least gain of a seed over no KD": common.target(least(DUAL, SHARED), 0.002),
        "MLP(16): AUC with its teacher alone - beside other students, at most": common.target(
            abs(own["auc"]["student"] - float(auc[DUAL][0])), 1e-5, at_most=True
        ),
    }
    if not quick:
        half, full = "two-stage, half a pass each", "two-stage, one pass each"
        targets |= {
            "MLP(16): least gain of a seed over Rocket Launching": common.target(
                least(DUAL, "Rocket Launching"), 0.003
            ),
            "MLP(16): % of the gap, dual - two-stage, one pass in all": common.target(
                float((closed[DUAL] - closed[half]).mean()), 0
            ),
            "MLP(16): % of the gap, dual - two-stage, two passes in all": common.target(
                float((closed[DUAL + PASSES[2]] - closed[full]).mean()), 0
            ),
        }
        sizes: list[Units] = [(64, 32), (256, 128, 64)]
        more, _, cin_disturbed = table(
            runs, "cin", sizes, CIN_METHODS, CIN_TOGETHER, {1: CIN_SEEDS}, [1]
        )
        rows += more
        disturbed += cin_disturbed
    targets["runs whose teacher differs in any bit from the one trained alone"] = common.target(
        disturbed, 0, at_most=True
    )
    return {"data_sha256": runs.data, "rows": rows, "targets": targets}
