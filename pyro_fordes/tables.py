"""Tables of results: columns by name, read as lists, rows, a data frame or text."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_fordes._checks import ArgumentError, CheckpointError, require
from pyro_fordes.estimates import CORRUPTED, is_detection

_NAME, _CELL, _PER_LINE = 24, 19, 4
"""Widths of a name and of a cell, and cells per line: 100 columns in all."""


@dataclass(frozen=True)
class Table:
    """A tidy table: one row for each method, data set, severity and metric.

    That of `tune` has other columns; see there.

    Attributes:
        columns: lists of equal length, by name.

            - ``method``: only where methods are compared.
            - ``data``: the name of a data set, or ``"corrupted"`` for the mean of all corruptions.
            - ``severity``: 0 for data as they are, else that of the corruption; None for the mean
              over severities, and for data outside the distribution.
            - ``metric``.
            - ``value`` of all points, ``low`` and ``high`` ends of its bootstrap interval.
            - ``points``: how many.
            - ``difference``, ``difference_low``, ``difference_high``: the same of the value minus
              the baseline's; None for the baseline. Only where methods are compared.
            - ``run_error``, ``difference_run_error``: standard errors over runs; None with one run.
        level: of the intervals.
        baseline: the method that the others are compared with; None without methods.
        runs: how many runs each value is the mean of.

    Example:
        >>> table = Table({"data": ["clean", "clean"], "metric": ["nll", "ece"], "value": [1, 2]})
        >>> table.select(metric="ece")["value"]
        [2]
    """

    columns: Mapping[str, list]
    level: float = 0.95
    baseline: str | None = None
    runs: int = 1

    def __len__(self) -> int:
        """Number of rows."""
        return len(next(iter(self.columns.values()), []))

    def __getitem__(self, name: str) -> list:
        """A column as a list."""
        self._check([name])
        return self.columns[name]

    def rows(self) -> list[dict[str, Any]]:
        """The rows, each by column."""
        return [
            dict(zip(self.columns, row, strict=True))
            for row in zip(*self.columns.values(), strict=True)
        ]

    def select(self, **wanted: Any) -> "Table":
        """The rows with these values in these columns.

        Args:
            **wanted: a value for each column that is to have it.

        Raises:
            ArgumentError: if there is no such column.
        """
        self._check(wanted)
        kept = [
            row for row in self.rows() if all(row[name] == value for name, value in wanted.items())
        ]
        columns = {name: [row[name] for row in kept] for name in self.columns}
        return Table(columns, self.level, self.baseline, self.runs)

    def to_frame(self) -> Any:
        """The table as a ``pandas.DataFrame``.

        Raises:
            MissingDependencyError: if pandas is not installed.
        """
        return require("pandas").DataFrame(dict(self.columns))

    def save(self, path: str | Path) -> None:
        """Write the table to a JSON file, which `load` reads.

        Raises:
            CheckpointError: if it cannot be written.
        """
        state = {"level": self.level, "baseline": self.baseline, "runs": self.runs}
        columns = ",\n  ".join(
            f"{json.dumps(name)}: {json.dumps(values)}" for name, values in self.columns.items()
        )
        text = f'{json.dumps(state)[:-1]},\n "columns": {{\n  {columns}\n}}}}\n'
        try:
            Path(path).write_text(text)
        except OSError as error:
            raise CheckpointError(f"cannot write the table {path}: {error}") from error

    @staticmethod
    def load(path: str | Path) -> "Table":
        """Read a table that `save` has written.

        Raises:
            CheckpointError: if there is no such file, or it is none of a table.
        """
        try:
            return Table(**json.loads(Path(path).read_text()))
        except OSError as error:
            raise CheckpointError(f"cannot read the table {path}: {error}") from error
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} has no table ({error}); Table.save writes one"
            ) from error

    def _check(self, names: Iterable[str]) -> None:
        """Raise an `ArgumentError` where there is no such column."""
        unknown = [name for name in names if name not in self.columns]
        if unknown:
            raise ArgumentError(f"the table has no column {unknown}; it has {list(self.columns)}")

    def __str__(self) -> str:
        """The table in at most 100 columns: means over severities, no single severity.

        One without metrics is shown as it is.
        """
        if "metric" not in self.columns:
            return _as_it_is(self.columns)
        head = f"value ± half of its {self.level:.0%} bootstrap interval over points"
        if self.baseline is not None:
            head += "; * where a difference's leaves out 0"
        if self.runs > 1:
            head += f"; mean of {self.runs} runs"
        return "\n".join([head, *self._blocks()])

    def _blocks(self) -> list[str]:
        """Lines of all blocks: data sets with the same metrics, or the methods on a data set."""
        lines: list[str] = []
        for (title, names), members in self._grouped().items():
            for start in range(0, len(names), _PER_LINE):
                metrics = names[start : start + _PER_LINE]
                lines += _header(title, metrics)
                for name, by_metric in members.items():
                    lines += self._lines(name, [by_metric[metric] for metric in metrics])
        return lines

    def _grouped(self) -> dict[tuple[str, tuple[str, ...]], dict[str, dict[str, Any]]]:
        """The rows to be printed, by block (its title and metrics), name and metric."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for row in self.rows():
            name = row["data"] if self.baseline is None else row["method"]
            title = "" if self.baseline is None else row["data"]
            if self._is_printed(row):
                found.setdefault((title, name), {})[row["metric"]] = row
        blocks: dict[tuple[str, tuple[str, ...]], dict[str, dict[str, Any]]] = {}
        for (title, name), by_metric in found.items():
            blocks.setdefault((title, tuple(by_metric)), {})[name] = by_metric
        return blocks

    def _is_printed(self, row: Mapping[str, Any]) -> bool:
        """Means over severities are; with methods, only the mean over corruptions too."""
        if self.baseline is None or row["severity"] is not None:
            return row["severity"] in (0, None)
        return row["data"] == CORRUPTED or is_detection(row["metric"])

    def _lines(self, name: str, rows: list[dict[str, Any]]) -> list[str]:
        """Values of a method or data set, and below their difference to the baseline's."""
        lines = [_line(name, [_cell(row["value"], row["low"], row["high"]) for row in rows])]
        if self.baseline not in (None, name):
            ends = ("difference", "difference_low", "difference_high")
            cells = [_cell(*[row[end] for end in ends], sign=True) for row in rows]
            lines.append(_line(f"  minus {self.baseline}", cells))
        return lines


def _as_it_is(columns: Mapping[str, list]) -> str:
    """All cells, each column as wide as it must be."""
    shown = []
    for name, values in columns.items():
        cells = [f"{v:.4f}" if isinstance(v, float) else str(v) for v in values]
        width = max(map(len, [name, *cells]))
        shown.append([f"{cell:>{width}}" for cell in (name, *cells)])
    return "\n".join("  ".join(row) for row in zip(*shown, strict=True))


def _header(title: str, metrics: Sequence[str]) -> list[str]:
    """A block's title and its metrics; the scores of detections in a second line."""
    parts = [metric.partition(":") for metric in metrics]
    lines = ["", _line(title, [f"{metric} " for metric, _, _ in parts])]
    if any(score for _, _, score in parts):
        lines.append(_line("", [f"{score} " for _, _, score in parts]))
    return lines


def _line(name: str, cells: Iterable[str]) -> str:
    """A name in the width of its column, and cells in that of theirs."""
    name = name if len(name) < _NAME else name[: _NAME - 2] + "…"
    return (f"{name:{_NAME}}" + "".join(f"{cell:>{_CELL}}" for cell in cells)).rstrip()


def _cell(value: float, low: float, high: float, *, sign: bool = False) -> str:
    """A value with half of its interval."""
    digits = 4 if abs(value) < 100 else 1
    if not math.isfinite(value):
        return f"{value} "
    mark = "*" if sign and not low <= 0 <= high else " "
    return f"{value:{'+' if sign else ''}.{digits}f} ±{(high - low) / 2:.{digits}f}{mark}"
