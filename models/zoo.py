"""The models by name, as recipes ask for them."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tf_keras

from qianmo.layers.features import check_type
from qianmo.layers.inner_loop import InnerLoop
from qianmo.layers.meta import Meta
from qianmo.layers.names import nearest
from qianmo.layers.schema import Schema
from qianmo.models import cross_domain, ctr, dual_dnn, multi_task, personal, two_tower
from qianmo.models.dual_dnn import FIELD_INTERACTIONS, FLAT_INTERACTIONS, DualDNN
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
        _check_part(role, config)
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


Parts = tuple[Callable[..., Any], ...]
Function = TypeVar("Function", bound=Callable[..., Ranker])
Interaction = TypeVar("Interaction", bound=type[tf_keras.layers.Layer])


def register(name: str, *, passes_to: Parts = (Ranker,)) -> Callable[[Function], Function]:
    """Makes a function a model that recipes can name; a decorator, for modules outside.

    Args:
      name: what recipes name it by.
      passes_to: functions and classes to which it passes on the keyword arguments that are not its
        own, which recipes may give too.

    Raises:
      ValueError: there is such a model.
    """

    def add(function: Function) -> Function:
        _check_new(name, function, {key: one for key, (one, _) in MODELS.items()})
        MODELS[name] = (function, passes_to)
        return function

    return add


def register_interaction(name: str, *, flat: bool = False) -> Callable[[Interaction], Interaction]:
    """Makes a layer an interaction that recipes can name; a decorator, for modules outside.

    Args:
      name: what `interactions` of a recipe name it by.
      flat: whether it reads the flat row [B, N], and not the field vectors [B, F, D].

    Raises:
      ValueError: there is such an interaction.
    """

    def add(layer: Interaction) -> Interaction:
        _check_new(name, layer, {**FIELD_INTERACTIONS, **FLAT_INTERACTIONS})
        (FLAT_INTERACTIONS if flat else FIELD_INTERACTIONS)[name] = layer
        return layer

    return add


def _check_new(name: str, made: Callable[..., Any], known: Mapping[str, Any]) -> None:
    """A module that is imported again may register again what it did before."""
    before = known.get(name)
    if before is not None and (before.__module__, before.__qualname__) != (
        made.__module__,
        made.__qualname__,
    ):
        raise ValueError(
            f"`{name}` is registered already, by {before.__module__}. Give another name."
        )


def _function(part: Callable[..., Any]) -> Callable[..., Any]:
    """A function itself, and of a class its own `__init__`, if it has one."""
    return vars(part).get("__init__", lambda: None) if isinstance(part, type) else part


def _parameters(part: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments of a model, or of a layer, that a recipe may give."""
    found = list(inspect.signature(_function(part)).parameters.values())
    # Of a model only keywords: what comes before them is the schema and layers.
    is_model = any(p.name == "schema" for p in found)
    return {
        p.name: p
        for p in found
        if p.kind is p.KEYWORD_ONLY
        or (not is_model and p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self")
    }


def _parts(name: str) -> Parts:
    """A model's function, and what it passes arguments on to."""
    function, passed_on = MODELS[name]
    return (function, *passed_on)


def arguments(name: str) -> list[str]:
    """Names of the arguments that a recipe may give to a model."""
    known = {key for part in _parts(name) for key in _parameters(part)}
    return sorted(known - {"linear_dim"})


def build(schema: Schema, config: Mapping[str, Any]) -> Ranker:
    """Builds the model that `config["name"]` names, with the other entries as its arguments.

    Raises:
      ValueError: as `check`; a wrong value.
    """
    check(config)
    values = dict(config)
    name = values.pop("name")
    try:
        return MODELS[name][0](schema, **values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model `{name}`: {error}") from error


def check(config: Mapping[str, Any]) -> None:
    """Looks at the names and types in a model's config, before any work is done for it.

    Raises:
      ValueError: an unknown model or argument, with the nearest known one; a value of another type;
        a missing argument.
    """
    values = dict(config)
    name = values.pop("name", None)
    if name not in MODELS:
        near = nearest(name, MODELS)
        hint = f"; did you mean `{near}`?" if near else "."
        raise ValueError(f"`model.name` should be one of {sorted(MODELS)}{hint} Received: {name!r}")
    where = f"model `{name}`"
    _check_arguments(where, _parts(name), values, hidden=("linear_dim",))
    if isinstance(meta := values.get("meta"), Mapping):
        _check_arguments(f"{where}: `meta`", (Meta,), meta)
        if isinstance(inner := meta["inner"], Mapping):
            _check_arguments(f"{where}: `meta.inner`", (InnerLoop,), inner)
    for key, given in (values.get("interactions") or {}).items():
        if layer := {**FIELD_INTERACTIONS, **FLAT_INTERACTIONS}.get(key):
            _check_arguments(f"{where}: interaction `{key}`", (layer,), given)
    for role in ("teacher", "student"):
        if isinstance(part := values.get(role), Mapping):
            _check_part(role, part)


def _check_part(role: str, config: Mapping[str, Any]) -> None:
    """As `check`; what belongs to the whole model is no part's."""
    of_the_whole = sorted(key for key in config if key in _parameters(Ranker))
    if of_the_whole:
        raise ValueError(
            f"`{role}`: `{of_the_whole[0]}` belongs to the whole model; give it beside `{role}`"
        )
    check(config)


def _check_arguments(
    where: str,
    parts: Sequence[Callable[..., Any]],
    values: Mapping[str, Any],
    hidden: Sequence[str] = (),
) -> None:
    """Compares values with the arguments that functions and classes declare."""
    hints: dict[str, Any] = {}
    required: list[str] = []
    for part in parts:
        types = typing.get_type_hints(_function(part))
        for key, parameter in _parameters(part).items():
            hints.setdefault(key, types.get(key, Any))
            if parameter.default is parameter.empty:
                required.append(key)
    known = sorted(hints.keys() - set(hidden))
    for key, value in values.items():
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean `{near}`?" if near else f"known: {', '.join(known) or 'none'}."
            raise ValueError(f"{where}: unknown argument `{key}`; {hint}")
        check_type(where, key, value, hints[key])
    for key in required:
        if key not in values:
            raise ValueError(f"{where}: missing argument `{key}`.")
