"""The models by name, as recipes ask for them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from qianmo.layers.features import Schema
from qianmo.models import cross_domain, ctr, dual_dnn, multi_task, personal
from qianmo.models.ranker import Ranker

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
    "star": (cross_domain.star, (Ranker,)),
    "cross_domain": (cross_domain.cross_domain, (Ranker,)),
    "shared_bottom": (multi_task.shared_bottom, (Ranker,)),
    "mmoe": (multi_task.mmoe, (Ranker,)),
    "ple": (multi_task.ple, (Ranker,)),
    "ppnet": (personal.ppnet, (Ranker,)),
    "poso": (personal.poso, (Ranker,)),
    "epnet": (personal.epnet, (Ranker,)),
}


def arguments(name: str) -> list[str]:
    """Names of the arguments that a recipe may give to a model."""
    function, passed_on = MODELS[name]
    signatures = [
        inspect.signature(vars(b)["__init__"] if isinstance(b, type) else b)
        for b in (function, *passed_on)
    ]
    return sorted(
        parameter.name
        for signature in signatures
        for parameter in signature.parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name != "linear_dim"
    )


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
