"""A schema proposed from a table: what its columns seem to be, and which should stay out.

It is a beginning for a person to read, so each choice comes with its reason.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from qianmo.layers.features import check_name
from qianmo.layers.schema import Schema
from qianmo.pipelines.data.columns import is_time
from qianmo.pipelines.data.errors import DataError
from qianmo.pipelines.data.facts import Facts, dependence

# In this order, when no label is named.
_LABELS = (
    *("label", "target", "y", "click", "clicked", "clk", "buy", "bought", "purchase", "purchased"),
    *("conversion", "converted", "like", "liked", "follow", "followed", "share", "shared"),
)
_RATINGS = ("rating", "stars", "score")
_OUTCOME = re.compile(
    "label|target|clic?k|clk|buy|bought|purchas|order|conver|like|follow|share|forward|comment"
    "|collect|favou?rite|hate|finish|complet|long_?view|enter|reward|cart|skip|outcome"
)
_OUTCOME_NUMBER = re.compile(
    "^(rating|stars|score|reward)$"
    "|(play|watch|view|dwell|stay|read|listen)(ing)?_?(time|duration|sec)"
)
_USER = re.compile("^(user|uid|user_?id|member(_?id)?|customer(_?id)?|visitor(_?id)?|device_?id)$")
_THINGS = (
    "item|movie|film|video|song|track|product|sku|asin|ad|author|music|creative|campaign|adgroup"
    "|shop|store|seller|brand|category|cate|tag|genre"
)
_ITEM = re.compile(f"(^|_)({_THINGS}|price|title)")
_ID = re.compile(f"(^|_)(id|ids|uid|user|query|code|type|zip|{_THINGS})(_?ids?)?s?$")
_DOMAIN = re.compile("^(tab|scene|domain|channel|scenario|site|market|country|app)(_?id)?$")
_FEW_VALUES = 256  # integers of so many values are categories
_MANY_VALUES = 2**20  # beyond, a vocabulary is a large part of the model: hashed
_LONGEST = 50  # of lists
_LEAK = 0.98  # of AUC or correlation with the label, by one column
_TASK_ROWS = 20  # on average, from which on a task may have vectors of its own
_TABLE_KEYS = ("dtype", "min_count", "hash_buckets")
_UNIQUE = "it differs in every row, so no value of it is met again."


@dataclasses.dataclass(frozen=True)
class Line:
    """An entry of the schema's features or labels, and why it is so."""

    entry: dict[str, Any]
    why: str

    @property
    def name(self) -> str:
        """Its column."""
        return str(self.entry["name"])


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A schema, with what to say of each part of it.

    Attributes:
      rows: of the sample.
      features: entries, in the table's order.
      labels: entries with `name`, `kind` and `optional`.
      roles: the schema's other keys.
      left_out: column -> why.
      notes: what else a person should decide.
    """

    rows: int
    features: list[Line]
    labels: list[Line]
    roles: dict[str, Any]
    left_out: dict[str, str]
    notes: list[str]

    def schema(self) -> dict[str, Any]:
        """What `Schema.from_config` takes."""
        kinds = {line.name: "rating" for line in self.labels if line.entry["kind"] == "rating"}
        optional = tuple(line.name for line in self.labels if line.entry["optional"])
        return {
            "features": [line.entry for line in self.features],
            "labels": tuple(line.name for line in self.labels),
            **({"label_kinds": kinds} if kinds else {}),
            **({"optional_labels": optional} if optional else {}),
            **self.roles,
        }


def propose(
    table: pa.Table,
    *,
    labels: Sequence[str] = (),
    task_id: str = "",
    timestamp: str = "",
    domain: str = "",
) -> Proposal:
    """Proposes a schema.

    Args:
      table: a sample of rows.
      labels: columns to predict; by default one that is named like an outcome.
      task_id: column of the task; by default one that is named like a user's id.
      timestamp: column of the time; by default one that looks like a time.
      domain: column of the domain, if any.

    Raises:
      DataError: no such columns, no label, names that do not go together, or no column that could
        be a feature.
    """
    names = table.column_names
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise DataError(f"column `{twice[0]}` is there twice; rename one of the two.")
    for name in (*labels, task_id, timestamp, domain):
        if name and name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"it holds: {', '.join(names)}."
            raise DataError(f"no column `{name}`; {hint}")
    facts = {name: Facts.of(name, table[name]) for name in names}
    labels = [*labels] or [_label(facts)]
    proposal = _Proposer(
        facts,
        labels,
        task_id or _first(facts, lambda f: bool(_USER.search(f.name.lower()))),
        timestamp or _first(facts, lambda f: bool(f.time_unit)),
        domain,
    ).made(len(table))
    try:
        Schema.from_config(proposal.schema())
    except ValueError as error:
        raise DataError(str(error)) from None
    return proposal


def _first(facts: dict[str, Facts], fits: Callable[[Facts], bool]) -> str:
    return next((name for name, f in facts.items() if not f.is_list and fits(f)), "")


def _label(facts: dict[str, Facts]) -> str:
    """The column that is named most like a label.

    Raises:
      DataError: none is.
    """
    plain = {name: re.sub("^(is|has)_", "", name.lower()) for name in facts}
    for wanted in _LABELS:
        for name, f in facts.items():
            if plain[name] == wanted and f.is_binary:
                return name
    rating = _first(facts, lambda f: f.name.lower() in _RATINGS and (f.is_float or f.is_integer))
    if rating:
        return rating
    binary = ", ".join(name for name, f in facts.items() if f.is_binary)
    shown = f"These hold 0 and 1: {binary}." if binary else "No column holds 0 and 1 alone."
    raise DataError(f"no column is named like a label. Name it by --label. {shown}")


class _Proposer:
    """Decides column by column."""

    def __init__(
        self, facts: dict[str, Facts], labels: Sequence[str], task: str, time: str, domain: str
    ) -> None:
        self.facts, self.labels = facts, labels
        self.task, self.time, self.domain = task, time, domain

    def made(self, rows: int) -> Proposal:
        """The proposal."""
        labels = [self._of_label(self.facts[name]) for name in self.labels]
        features: list[Line] = []
        left_out: dict[str, str] = {}
        for name, f in self.facts.items():
            if name in self.labels:
                continue
            if why := self._fault(f) or self._leak(f):
                left_out[name] = why
            else:
                features.append(self._feature(f))
        if not features:
            raise DataError("no column could be a feature: all are labels, or stay out.")
        features = [self._with_table(line, features) for line in features]
        notes = self._notes(left_out)
        return Proposal(rows, features, labels, self._roles(), left_out, notes)

    def _of_label(self, f: Facts) -> Line:
        if f.is_list or not (f.is_float or f.is_integer) or not len(f.values):
            raise DataError(
                f"label `{f.name}` should hold numbers. Found: {f.column.type}. Convert it."
            )
        low, high = f.numbers.min(), f.numbers.max()
        why = f"{100 * f.numbers.mean():.2g} % are 1" if f.is_binary else f"{low:g} to {high:g}"
        why += f", {f.null_share} of the rows have none" * bool(f.nulls)
        kind = "binary" if low >= 0 and high <= 1 else "rating"
        return Line({"name": f.name, "kind": kind, "optional": bool(f.nulls)}, f"{why}.")

    def _fault(self, f: Facts) -> str:
        """Why a column is no feature, by what it holds."""
        try:
            check_name(f.name)
        except ValueError:
            return "its name can be no input of a served model; rename the column."
        if f.name == self.time or f.time_unit:
            return "a time: rows to come have later ones, which training has not seen."
        if f.is_day:
            return "a day: rows to come have later ones, which training has not seen."
        if not len(f.values):
            return "it holds nothing."
        if not (f.is_float or f.is_integer or f.is_string) or is_time(f.values.type):
            return f"no feature holds {f.column.type}."
        if f.is_list:
            return "a list of numbers that are no integers." if f.is_float else ""
        if f.distinct == 1 and not f.nulls:
            return f"it is {f.first} in all rows."
        if f.name == self.task:
            rows = len(f.values) / f.distinct
            return (
                ""
                if rows >= _TASK_ROWS
                else (
                    f"a task has {rows:.0f} rows on average, by which its vectors would learn the "
                    "training rows by heart. Histories and rates say the same of new tasks."
                )
            )
        if f.name == self.domain:
            return ""
        if not f.is_float and f.distinct == f.rows > 100:
            return _UNIQUE
        if f.is_string and f.distinct > 0.5 * f.rows > 50:
            length = pc.mean(pc.binary_length(f.values)).as_py()
            if length > 30:
                return f"text of {length:.0f} bytes on average, seldom twice the same."
        return ""

    def _leak(self, f: Facts) -> str:
        """Why a column seems to tell the label."""
        name = f.name.lower()
        if f.is_binary and _OUTCOME.search(name):
            return "0 or 1 and named like an outcome, known only after the row. It may be a label."
        if not f.is_list and not f.is_string and _OUTCOME_NUMBER.search(name):
            return "named like an outcome, known only after the row. It may be a label."
        label = self.facts[self.labels[0]]
        found = dependence(f, label)
        if found < _LEAK:
            return ""
        measure = "AUC" if label.is_binary else "correlation"
        return f"alone it tells `{label.name}`, with {measure} {found:.3f}: it may follow from it."

    def _feature(self, f: Facts) -> Line:
        entry: dict[str, Any] = {"name": f.name}
        said = []
        is_category = f.is_string or f.is_list or (f.is_integer and self._is_category(f))
        if not is_category:
            entry["kind"] = "dense"
            said.append(f"{f.numbers.min():.4g} to {f.numbers.max():.4g}")
            if f.is_integer:
                said.append("a number, as it seems; without `kind` its values are categories")
            elif f.nulls and (f.numbers % 1 == 0).all():
                said.append("whole numbers: as int64 with nulls they could be categories")
            if f.nulls:
                entry["indicator"] = True
        else:
            said.append(f"{f.distinct:,} values")
            if f.is_string:
                entry["dtype"] = "string"
            if f.distinct > _MANY_VALUES:
                entry["hash_buckets"] = 2 ** math.ceil(math.log2(f.distinct))
            elif f.distinct > 1000 and f.common(3) > f.distinct / 10:
                entry["min_count"] = 3  # rarer ones share the row of unknown values
            if f.is_list:
                lengths = pc.fill_null(pc.list_value_length(f.column), 0).to_numpy()
                most = int(np.quantile(lengths, 0.95, method="higher"))
                entry["max_length"] = min(max(most, 1), _LONGEST)
                said.append(f"lists of up to {lengths.max()}")
            if f.nulls or f.has_null_items:
                entry["default"] = () if f.is_list else f.unused()
        if f.nulls:
            said.append(f"{f.null_share} null")
        if f.name == self.task or f.name.lower().startswith("user"):
            entry["side"] = "user"
        elif _ITEM.search(f.name.lower()) and not f.is_list and not f.is_binary:
            entry["side"] = "item"
        return Line(entry, f"{', '.join(said)}.")

    def _is_category(self, f: Facts) -> bool:
        if f.name in (self.task, self.domain) or f.distinct <= _FEW_VALUES:
            return True
        return bool(_ID.search(f.name.lower()))

    def _with_table(self, line: Line, features: Sequence[Line]) -> Line:
        """Lets a list share the table of the single feature that holds the same values."""
        if "max_length" not in line.entry:
            return line
        own = self.facts[line.name]
        best, shared, inside = 0.3, None, 0
        for other in features:
            f = self.facts[other.name]
            if f.is_list or "kind" in other.entry or f.is_string != own.is_string:
                continue
            common = len(np.intersect1d(own.hashed, f.hashed))
            share = common / (own.distinct + f.distinct - common)
            if f.distinct >= 20 and share > best:
                best, shared, inside = share, other, common
        if shared is None:
            return line
        entry = {key: value for key, value in line.entry.items() if key not in _TABLE_KEYS}
        entry |= {key: shared.entry[key] for key in _TABLE_KEYS if key in shared.entry}
        held = f"{100 * inside / own.distinct:.0f} % of them are values of `{shared.name}`"
        why = f"{line.why[:-1]}; {held}."
        return Line({**entry, "table": shared.name}, why)

    def _roles(self) -> dict[str, Any]:
        roles: dict[str, Any] = {}
        if self.time:
            roles["timestamp"] = self.time
            unit = self.facts[self.time].time_unit
            if unit not in ("", "time"):
                roles["timestamp_unit"] = unit
        if self.task:
            roles["task_id"] = self.task
            if self.facts[self.task].is_string:
                roles["task_dtype"] = "string"
        if self.domain:
            roles["domain"] = self.domain
        return roles

    def _notes(self, left_out: dict[str, str]) -> list[str]:
        notes = []
        if not self.domain:
            for name, f in self.facts.items():
                if _DOMAIN.search(name.lower()) and 2 <= f.distinct <= 50 and not f.is_list:
                    notes.append(f"`{name}` may be the `domain`: metrics are then given by it.")
        for name, why in left_out.items():
            if why == _UNIQUE and self.facts[name].is_integer and self.task and self.time:
                notes.append(f"`{name}` may be the `event_id`, which tells a task's rows apart.")
        return notes
