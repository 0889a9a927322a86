"""How rows and their summaries become the lines of a file. Cells are written as they were read."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_freeze.errors import ReviewsError, nearest
from hf_freeze.summarization.data.files import FORMATS, TABLES
from hf_freeze.summarization.data.rows import Row

__all__ = ["RowLines", "spreadsheet_safe"]

# What makes a spreadsheet take a cell for a formula, by OWASP's list ("CSV Injection"), with the full-width signs that
# East Asian versions take for the same.
FORMULA_STARTS = tuple("=+-@\t\r\n＝＋－＠")


def spreadsheet_safe(text: str) -> str:
    """A text that no spreadsheet takes for a formula: with an apostrophe before it where it begins like one.

    Spreadsheets show what follows the apostrophe as text and run nothing (OWASP, "CSV Injection").

    >>> spreadsheet_safe("=HYPERLINK(A1)"), spreadsheet_safe("Good mug.")
    ("'=HYPERLINK(A1)", 'Good mug.')
    """
    return f"'{text}" if text.startswith(FORMULA_STARTS) or text.lstrip().startswith(FORMULA_STARTS) else text


class RowLines:
    """How rows and their summaries become lines: those of a .csv, .tsv or .jsonl file.

    Cells are written as they were read. In a table a summary that begins like a formula gets an apostrophe
    (`spreadsheet_safe`); JSON lines hold it as it is, since no spreadsheet reads them.

    Args:
        path: its ending decides.
        columns: the input's columns.
        summary_column: name of the added column.
        separator: of a .csv; "" is a comma.
        header: what the header calls the columns; None is their names.

    Raises:
        ReviewsError: another ending, or a summary column that the input has.

    >>> lines = RowLines(Path("out.csv"), ["id"], "summary")
    >>> lines.header + lines.line(Row({"id": "7"}, ""), "-5 stars.")
    "id,summary\\n7,'-5 stars.\\n"
    >>> RowLines(Path("out.csv"), ["id"], "summary").line(Row({"id": "a,b"}, ""), "Fine.")
    '"a,b",Fine.\\n'
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        summary_column: str,
        separator: str = "",
        header: Sequence[str] | None = None,
    ) -> None:
        self.kind = FORMATS.get(path.suffix.lower(), "")
        if self.kind not in (*TABLES, "JSON lines"):
            raise ReviewsError(
                f"The summaries were to be written to {path}, which ends in {path.suffix!r}; written are .csv, .tsv "
                f"and .jsonl. Choose one of these endings."
            )
        if summary_column in columns:
            raise ReviewsError(
                f"The summaries were to be written to column {summary_column!r}, which the input has already: "
                f"{', '.join(map(repr, columns))}. Name another one (--summary_column), e.g. 'new_{summary_column}'."
            )
        self.columns = list(columns)
        self.summary_column = summary_column
        self.separator = separator if separator and self.kind == "CSV" else TABLES.get(self.kind, "")
        self.header = self._table_line([*(header or columns), summary_column]) if self.kind in TABLES else ""

    def line(self, row: Row, summary: str) -> str:
        """One line, its end included.

        Raises:
            ReviewsError: a row with a column that the header does not have.
        """
        if self.kind in TABLES:
            if row.values.keys() - set(self.columns):
                self._refuse(row)
            cells = [_cell(row.values.get(name)) for name in self.columns]
            return self._table_line([*cells, spreadsheet_safe(summary)])
        added = json.dumps({self.summary_column: summary}, ensure_ascii=False)
        if self.summary_column in row.values:
            self._refuse(row)
        if not row.values:
            return added + "\n"
        # JSON's own characters where there are any: 1.10 stays 1.10.
        text = row.text or json.dumps(_without_nan(dict(row.values)), ensure_ascii=False, default=str)
        return f"{text[:-1].rstrip()}, {added[1:]}\n"

    def _refuse(self, row: Row) -> None:
        wrong = next(name for name in row.values if name == self.summary_column or name not in self.columns)
        raise ReviewsError(
            f"{row.place} has the column {wrong!r}, which the rows before it had not; nearest of theirs: "
            f"{nearest(wrong, self.columns)}. Give all rows the same columns, or name another --summary_column."
        )

    def _table_line(self, cells: Sequence[str]) -> str:
        sink = io.StringIO()
        # With both characters as its line end the writer quotes cells that hold either, as every reader needs it.
        csv.writer(sink, delimiter=self.separator, lineterminator="\r\n").writerow(cells)
        return sink.getvalue()[:-2] + "\n"


def _without_nan(value: Any) -> Any:
    """A value as JSON has it: null for numbers that are none, which nobody else could read (Parquet and pandas)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    return [_without_nan(one) for one in value] if isinstance(value, list) else value


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
