"""What a reader left out of the rows that it read."""

from __future__ import annotations

import collections
import dataclasses

from qianmo.layers.schema import Schema


@dataclasses.dataclass
class Tally:
    """Counts of what was read and left out; readers that are given one add to it.

    Attributes:
      rows: rows of the files.
      of_other_domains: those among them that `only_domains` leaves out.
      lists: list feature -> its lists in these rows, empty ones too.
      cut_lists: list feature -> how many of them were longer than `max_length`.
      cut_values: list feature -> values that were cut off.
    """

    rows: int = 0
    of_other_domains: int = 0
    lists: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    cut_lists: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    cut_values: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def lines(self, schema: Schema) -> list[str]:
        """What was left out and why, a sentence each."""
        found = []
        if self.of_other_domains:
            found.append(
                f"{self.of_other_domains:,} of {self.rows:,} rows are of other domains than "
                f"{schema.only_domains} and left out, as `only_domains` says."
            )
        for feature in schema.categorical:
            if count := self.cut_lists[feature.name]:
                end = "start" if feature.keep == "last" else "end"
                found.append(
                    f"{count:,} of {self.lists[feature.name]:,} lists `{feature.name}` are longer "
                    f"than `max_length` {feature.max_length}: {self.cut_values[feature.name]:,} "
                    f"values at their {end} are left out."
                )
        return found
