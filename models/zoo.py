"""The models by name, as recipes ask for them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from qianmo.layers.schema import Schema
from qianmo.models import cross_domain, ctr, dual_dnn, multi_task, personal, two_tower
from qianmo.models.dual_dnn import DualDNN
from qianmo.models.ranker import Ranker
from qianmo.models.road import Road


def distilled(
    schema: Schema, *, teacher: Mapping[str, Any], student: Mapping[str, Any], **kwargs: Any
) -> DualDNN:
    """A dual DNN of any two models of one bottom and one tower, each as a recipe names it.

    The teacher starts, and its tables do, as when it is trained alone with the same seed.

    Args:
      schema: what a row holds.
      teacher: config of the teacher, such as a cross-domain assembly with star towers.
      student: config of the student, whose tower serves; `meta` makes that one a meta tower.
      **kwargs: arguments of `DualDNN` and `Ranker`.

    Raises:
      ValueError: a model of another form, models that want different schemas, or an argument
        of the whole in a part.
    """
    roads: list[Road] = []
    for role, config in (("teacher", teacher), ("student", student)):
        of_the_whole = sorted(key for key in config if key in _keywords(Ranker))
        if of_the_whole:
            raise ValueError(
                f"`{role}`: `{of_the_whole[0]}` belongs to the whole model; give it beside `{role}`"
            )
        road = build(roads[0].schema if roads else schema, config)
        if not isinstance(road, Road):
            raise ValueError(
                f"`{role}` should be a model of one bottom and one tower. "
                f"Received: {config['name']!r}"
            )
        roads.append(road)
    first, second = roads
    if first.schema != second.schema:
        raise ValueError(
            f"`student`: model `{student['name']}` changes the schema, which its teacher shares."
        )
    of_tables = {
        "linear_dim": max(first.embed.linear_dim, second.embed.linear_dim),
        "embedding_seed": first.embed.seed,
    }
    parts = (first.bottom, first.tower, second.bottom, second.tower)
    return DualDNN(first.schema, *parts, **{**of_tables, **kwargs})


# name -> its function, and the functions and classes whose keyword arguments it passes on.
MODELS: dict[str, tuple[Callable[..., Ranker], tuple[Callable[..., Ranker], ...]]] = {
    "lr": (ctr.lr, (ctr.road, Ranker)),
    "mlp": (ctr.mlp, (ctr.road, Ranker)),
    "wdl": (ctr.wdl, (ctr.road, Ranker)),
    "deepfm": (ctr.deepfm, (ctr.road, Ranker)),
    "dcn": (ctr.dcn, (ctr.road, Ranker)),
    "xdeepfm": (ctr.xdeepfm, (ctr.road, Ranker)),
    "dual_dnn": (dual_dnn.dual_dnn, (dual_dnn.DualDNN, Ranker)),
    "teacher_alone": (dual_dnn.teacher_alone, (Ranker,)),
    "distilled": (distilled, (DualDNN, Ranker)),
    "star": (cross_domain.star, (Ranker,)),
    "cross_domain": (cross_domain.cross_domain, (Ranker,)),
    "shared_bottom": (multi_task.shared_bottom, (Ranker,)),
    "mmoe": (multi_task.mmoe, (Ranker,)),
    "ple": (multi_task.ple, (Ranker,)),
    "ppnet": (personal.ppnet, (Ranker,)),
    "poso": (personal.poso, (Ranker,)),
    "epnet": (personal.epnet, (Ranker,)),
    "two_tower": (two_tower.two_tower, (Ranker,)),
}


def _keywords(part: Callable[..., Ranker]) -> list[str]:
    """Names of the keyword arguments of a function or a class."""
    signature = inspect.signature(vars(part)["__init__"] if isinstance(part, type) else part)
    return [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]


def arguments(name: str) -> list[str]:
    """Names of the arguments that a recipe may give to a model."""
    function, passed_on = MODELS[name]
    known = {key for part in (function, *passed_on) for key in _keywords(part)}
    return sorted(known - {"linear_dim"})


def build(schema: Schema, config: Mapping[str, Any]) -> Ranker:
    """Builds the model that `config["name"]` names, with the other entries as its arguments.

    Raises:
      ValueError: an unknown model or argument, with the nearest known one; a wrong value.
    """
    check(config)
    values = dict(config)
    name = values.pop("name")
    try:
        return MODELS[name][0](schema, **values)
    except TypeError as error:  # a missing argument, or a wrong one of an interaction
        raise ValueError(f"model `{name}`: {error}") from error


def check(config: Mapping[str, Any]) -> None:
    """Looks at the names in a model's config, before any work is done for it.

    Raises:
      ValueError: an unknown model or argument, with the nearest known one.
    """
    values = dict(config)
    name = values.pop("name", None)
    if name not in MODELS:
        raise ValueError(f"`model.name` should be one of {sorted(MODELS)}. Received: {name!r}")
    known = arguments(name)
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}."
            raise ValueError(f"model `{name}`: unknown argument `{key}`; {hint}")
