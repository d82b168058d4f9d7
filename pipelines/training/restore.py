"""Weights of one model for another: matched by meaning, or refused.

The parts of a model are its layers by attribute: `embed`, `bottom`, `tower`, ... Two parts mean the
same when they are built with the same arguments, read the same features in the same order, and
write the same labels. Everything else starts new here, or is left over there, and a recipe must
name it in `train.start_except`; for what nobody named would be a surprise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import tensorflow as tf
import tf_keras

from qianmo.layers.features import Categorical
from qianmo.layers.schema import Schema
from qianmo.models.ranker import Ranker
from qianmo.pipelines.run_dir import variables

# Arguments that may differ between models whose weights mean the same.
_OF_TRAINING = {"name", "seed", "dropout", "dtype", "trainable", "l2", "stddev"}
_MAX_SHOWN = 4  # differences named in a message


def parts(model: Ranker) -> dict[str, Any]:
    """The parts of a model that hold variables, by attribute."""
    children = tf.train.TrackableView(model).children(model)
    return {
        name: child
        for name, child in children.items()
        if not isinstance(child, tf.Variable) and variables(child)
    }


def _differences(here: Any, there: Any, path: str = "") -> Iterator[str]:
    """Where two configs differ in what weights mean."""
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        for key in sorted(here.keys() | there.keys()):
            if key not in _OF_TRAINING:
                inner = f"{path}.{key}" if path else key
                yield from _differences(here.get(key), there.get(key), inner)
    elif isinstance(here, list | tuple) and isinstance(there, list | tuple):
        if len(here) != len(there):
            yield f"{path}: {here} and there {there}"
        for number, pair in enumerate(zip(here, there, strict=False)):
            yield from _differences(*pair, f"{path}[{number}]")
    elif here != there:
        yield f"{path}: {here!r} and there {there!r}"


def _config(part: Any) -> Any:
    """What a part is built with; a list of layers is known by its layers."""
    if isinstance(part, tf_keras.layers.Layer):
        return tf_keras.layers.serialize(part)
    return [each and tf_keras.layers.serialize(each) for each in part]


def table_differences(here: Schema, there: Schema) -> list[str]:
    """Which tables differ in their rows, or in their order."""
    differs = []
    for name in sorted(here.tables.keys() | there.tables.keys()):
        ours, theirs = here.tables.get(name), there.tables.get(name)
        if ours is None or theirs is None:
            differs.append(f"table `{name}` is only {'there' if ours is None else 'here'}")
            continue
        for key in ("dtype", "dim", "num_ids", "hash_buckets", "vocabulary"):
            a, b = getattr(ours, key), getattr(theirs, key)
            if a != b:
                shown = f"{a!r} and there {b!r}" if key != "vocabulary" else "other values"
                differs.append(f"table `{name}`, `{key}`: {shown}")
    if not differs and [*here.tables] != [*there.tables]:
        differs.append(f"tables in another order: {[*here.tables]} and there {[*there.tables]}")
    return differs


def _reads(schema: Schema) -> list[Any]:
    """What a bottom meets, in order: features with what decides their vectors."""
    return [
        (f.name, f.table, f.dim, f.max_length, f.pooling, f.domains)
        if isinstance(f, Categorical)
        else (f.name, f.indicator, f.domains, f.mean, f.variance)
        for f in schema.features
    ]


def _label_differences(here: Schema, there: Schema) -> list[str]:
    """Labels that are not the same, or mean something else."""
    others = sorted(set(here.labels) ^ set(there.labels))
    differs = [f"other labels: {others}"] if others else []
    for label in sorted(set(here.labels) & set(there.labels)):
        ours, theirs = ((s.kind(label), s.label_moments.get(label)) for s in (here, there))
        if ours != theirs:
            differs.append(f"label `{label}`: {ours} and there {theirs}")
    return differs


def _input_differences(here: Schema, there: Schema) -> list[str]:
    """Features that are not the same, or stand in another order."""
    ours, theirs = _reads(here), _reads(there)
    if ours == theirs:
        return []
    by_name = [{read[0]: read for read in reads} for reads in (ours, theirs)]
    differs = [f"feature `{n}` is only here" for n in by_name[0] if n not in by_name[1]]
    differs += [f"feature `{n}` is only there" for n in by_name[1] if n not in by_name[0]]
    for name in by_name[0].keys() & by_name[1].keys():
        if by_name[0][name] != by_name[1][name]:
            differs.append(f"feature `{name}`: {by_name[0][name]} and there {by_name[1][name]}")
    return differs or ["the features stand in another order"]


@dataclasses.dataclass(frozen=True)
class Match:
    """What one model takes from another.

    Attributes:
      source: what the weights come from, as messages name it.
      pairs: part -> pairs of a variable here and its like there.
      new: parts here that take nothing -> why.
      left: parts there that nothing takes -> why.
    """

    source: str
    pairs: Mapping[str, list[tuple[tf.Variable, tf.Variable]]]
    new: Mapping[str, str]
    left: Mapping[str, str]

    def lines(self) -> Iterator[str]:
        """What matched, what starts new, what is left over."""
        numbers = {
            part: sum(int(tf.size(here)) for here, _ in pairs) for part, pairs in self.pairs.items()
        }
        taken = ", ".join(f"{part} ({number:,})" for part, number in numbers.items())
        yield f"Weights from {self.source}: {taken or 'none'}"
        for what, there in (("starts new", self.new), ("left over there", self.left)):
            for part, why in there.items():
                yield f"  {what}: {part} ({why})"


def _weights(by_path: Mapping[str, tf.Variable]) -> set[str]:
    """The paths of weights; counters, such as of dropout's calls, may come and go."""
    return {path for path, variable in by_path.items() if variable.dtype.is_floating}


def match(here: Ranker, there: Ranker, source: str, allowed: Collection[str] = ()) -> Match:
    """Pairs the variables of two models that mean the same.

    Args:
      here: the model that takes weights.
      there: the model that gives them.
      source: name of the latter for messages, such as its directory.
      allowed: parts that may start new here, or be left over there.

    Raises:
      ValueError: other parts differ, or `allowed` names a part of neither.
    """
    ours, theirs = parts(here), parts(there)
    unknown = sorted(set(allowed) - ours.keys() - theirs.keys())
    if unknown:
        raise ValueError(
            f"`train.start_except`: neither model has a part `{unknown[0]}`; this one has "
            f"{', '.join(ours)}, that of {source} {', '.join(theirs)}."
        )
    inputs = _input_differences(here.schema, there.schema)
    labels = _label_differences(here.schema, there.schema)
    pairs: dict[str, list[tuple[tf.Variable, tf.Variable]]] = {}
    new: dict[str, str] = {}
    left: dict[str, str] = {name: "not here" for name in theirs if name not in ours}
    for name, part in ours.items():
        if name not in theirs:
            new[name] = "not there"
            continue
        if name == "embed":
            differs = table_differences(here.schema, there.schema)
            widths = here.embed.linear_dim, there.embed.linear_dim
            if widths[0] != widths[1]:
                differs.append(f"first-order columns: {widths[0]} and there {widths[1]}")
            if widths[0] and labels:
                differs += [f"first-order columns: {each}" for each in labels]
        else:
            differs = [*inputs, *_differences(_config(part), _config(theirs[name]))]
            if labels and name != "bottom":
                differs += labels
        a, b = variables(part), variables(theirs[name])
        if not differs:
            differs += [f"`{path}` is only here" for path in _weights(a) - b.keys()]
            differs += [f"`{path}` is only there" for path in _weights(b) - a.keys()]
            differs += [
                f"`{path}` is {a[path].shape} and there {b[path].shape}"
                for path in a.keys() & b.keys()
                if a[path].shape != b[path].shape
            ]
        if differs:
            more = len(differs) - _MAX_SHOWN
            why = "; ".join(differs[:_MAX_SHOWN]) + (f"; and {more} more" if more > 0 else "")
            new[name] = left[name] = why
        else:
            pairs[name] = [(a[path], b[path]) for path in a.keys() & b.keys()]
    surprises = {**left, **new}
    surprises = {name: why for name, why in surprises.items() if name not in allowed}
    if surprises:
        shown = "; ".join(f"`{name}`: {why}" for name, why in surprises.items())
        raise ValueError(
            f"the weights of {source} do not fit this model: {shown}. Make the recipes agree, or "
            f"name what may start new: train.start_except={tuple(surprises)}"
        )
    return Match(source, pairs, new, left)


def take(found: Match) -> None:
    """Puts the weights into their places."""
    for pairs in found.pairs.values():
        for here, there in pairs:
            here.assign(there)


def newest(manager: tf.train.CheckpointManager) -> bool:
    """Restores the newest checkpoint that can be read; tells whether there was one.

    Raises:
      ValueError: there are checkpoints, and none can be read.
    """
    for path in reversed(manager.checkpoints):
        try:
            manager.checkpoint.restore(path).assert_existing_objects_matched()
        except (tf.errors.OpError, AssertionError, IndexError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            print(f"warning: {path} cannot be read: {reason} The one before it is tried.")
            continue
        return True
    if manager.checkpoints:
        raise ValueError(
            f"{manager.directory}: none of {len(manager.checkpoints)} checkpoints can be read. "
            "They are damaged, or of another version of this package. Start afresh in another "
            "folder."
        )
    return False
