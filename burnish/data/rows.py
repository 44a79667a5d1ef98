"""A file → its rows, each with the line it stands on; a row that cannot be read is a row with a reason.

    {"instruction": "hi", "output": "hello"}      →  Row({"instruction": …}, "data/pairs.jsonl:1")
    {"instruction": "hi", "outp                   →  Row(None, "data/pairs.jsonl:2", "JSON is cut off")

Readers never stop at a broken row where the next one can be found, so that `report.py` can count what was lost. What a
row means is not known here. Blank lines are no rows. Rows of parquet and arrow are numbered from 1.
"""

from __future__ import annotations

import codecs
import csv
import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO

from burnish.errors import Problem, UserError

FILE_TYPES = ("json", "jsonl", "csv", "parquet", "arrow", "txt")
CUT_OFF = "JSON is cut off"
NOT_JSON = "is not valid JSON"
NOT_UTF8 = "is not UTF-8"
NOT_AN_OBJECT = "is not a JSON object"

_GAP = re.compile(r"[\s,]*")  # between two rows of an array or of a stream of objects
_BLANK = re.compile(r"\s*")
_WINDOW = 2**20  # characters of a JSON file that are read at once
_LONGEST_WORD = 16  # -Infinity, \ud83d: what a window's end may cut and a decoder not understand
_NOT_UTF8_BYTE = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of a byte that is not UTF-8


class Row(NamedTuple):
    """One row as it stands in its file. `value` is None where it could not be read; `reason` says why."""

    value: dict[str, Any] | None
    place: str  # "data/pairs.jsonl:17"
    reason: str = ""


def file_type(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()


def read_rows(path: str) -> Iterator[Row]:
    """The rows of one file, lazily where its format allows.

    Raises UserError where the file as a whole cannot be read, or where no row after a broken one can be found.
    """
    readers = {
        "json": _read_json,
        "jsonl": _read_jsonl,
        "csv": _read_csv,
        "txt": _read_txt,
        "parquet": _read_parquet,
        "arrow": _read_arrow,
    }
    try:
        yield from readers[file_type(path)](path)
    except OSError as error:
        raise UserError(Problem(path, "", None, f"cannot be read: {error.strerror or error}")) from error


def _read_jsonl(path: str) -> Iterator[Row]:
    with open(path, "rb") as file:
        if _starts_with(file.read(4096), path) == b"[":  # an array under the wrong name
            yield from _read_json(path)
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield _parse_line(line, f"{path}:{number}")


def _parse_line(line: bytes, place: str) -> Row:
    try:
        return _row(json.loads(line.decode("utf-8")), place)
    except UnicodeDecodeError:
        return Row(None, place, NOT_UTF8)
    except (ValueError, RecursionError) as error:
        return Row(None, place, _json_reason(error, len(line.decode("utf-8").rstrip())))


def _read_json(path: str) -> Iterator[Row]:
    """An array of objects, or objects one after the other, on one line each or on many."""
    with open(path, "rb") as head:
        _starts_with(head.read(4096), path)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        window = _Window(file)
        in_array = window.skip_gap() and window.text[window.at] == "["
        window.at += in_array
        while window.skip_gap():
            place = f"{path}:{window.line()}"
            if in_array and window.text[window.at] == "]":
                window.at += 1
                if window.skip_gap(_BLANK):
                    yield Row(None, place, "something stands after the end of the JSON array")
                return
            try:
                value, is_utf8 = window.decode()
            except (ValueError, RecursionError) as error:
                reason, before = _json_reason(error, window.end_of_text()), window.before
                yield Row(None, place, reason)
                if not window.skip_row():
                    if reason != CUT_OFF:
                        raise UserError(_lost_rest(error, place, before)) from error
                    return
                continue
            yield _row(value, place) if is_utf8 else Row(None, place, NOT_UTF8)
        if in_array:
            yield Row(None, f"{path}:{window.line()}", CUT_OFF)  # no closing bracket


class _Window:
    """The piece of a JSON text that is being read, from the row that `text[at]` begins. It grows to the right where a
    row reaches beyond it, and what was read is then left behind, so that a file of any size needs a row's memory.
    """

    def __init__(self, file: TextIO):
        self._file, self._decoder = file, json.JSONDecoder()
        self.text, self.at = "", 0
        self.before = 0  # characters of the window's first line that were left behind
        self._is_last, self._line, self._counted = False, 1, 0

    def line(self) -> int:
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def skip_gap(self, gap: re.Pattern[str] = _GAP) -> bool:
        """Go on to what is no gap; False where nothing is left."""
        while True:
            if match := gap.match(self.text, self.at):
                self.at = match.end()
            if self.at < len(self.text):
                return True
            if not self._grow():
                return False

    def decode(self) -> tuple[Any, bool]:
        """The value that begins here, and whether it is UTF-8. Raises what `raw_decode` raises."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self._may_go_on(error) and self._grow():
                    continue
                raise
            if end == len(self.text) and self._grow():  # a number may go on
                continue
            is_utf8 = not _NOT_UTF8_BYTE.search(self.text, self.at, end)
            self.at = end
            return value, is_utf8

    def skip_row(self) -> bool:
        """Go on from a broken row to the one after it: the next line that opens an object at the same depth."""
        line = self.text[self.text.rfind("\n", 0, self.at) + 1 : self.at + 1]
        opening = f"\n{_indent(line)}{{"
        while (found := self.text.find(opening, self.at)) < 0:
            if not self._grow():
                return False
        self.at = found + len(opening) - 1
        return True

    def end_of_text(self) -> int:
        """Where the last word of the file ends, or a place beyond the window."""
        return len(self.text.rstrip()) if self._is_last else len(self.text) + 1

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether it is the window's end that breaks the row, and not the row."""
        cut_string = error.msg.startswith("Unterminated string")
        return cut_string or not self.text[error.pos + _LONGEST_WORD :].strip()

    def _grow(self) -> bool:
        more = "" if self._is_last else self._file.read(max(_WINDOW, len(self.text)))
        if not more:
            self._is_last = True
            return False
        self.line()
        line_start = self.text.rfind("\n", 0, self.at) + 1
        indent = _indent(self.text[line_start : self.at])  # it says later at which depth rows begin
        self.before = self.at - line_start - len(indent) + (self.before if line_start == 0 else 0)
        self.text = indent + self.text[self.at :] + more
        self.at = self._counted = len(indent)
        return True


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _lost_rest(error: Exception, place: str, before: int) -> Problem:
    where = ""
    if isinstance(error, json.JSONDecodeError):
        where = f" at column {error.colno + (before if error.lineno == 1 else 0)}"
    return Problem(
        place, "", None, f"{NOT_JSON}{where}, and no row after it can be told apart", "mend it, or write one row a line"
    )


def _json_reason(error: Exception, end_of_text: int) -> str:
    if isinstance(error, RecursionError):
        return "JSON is nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return NOT_JSON  # a number of thousands of digits
    return CUT_OFF if error.pos >= end_of_text or error.msg.startswith("Unterminated string") else NOT_JSON


def _row(value: Any, place: str) -> Row:
    return Row(value, place) if isinstance(value, dict) else Row(None, place, NOT_AN_OBJECT)


def _starts_with(head: bytes, path: str) -> bytes:
    """The first byte that is not blank. A file in UTF-16 is refused here, once, not row by row."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(Problem(path, "", None, "is UTF-16", "save it as UTF-8"))
    return head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]


def _read_csv(path: str) -> Iterator[Row]:
    """Every value is a string, as it stands: `NA` and `007` are words, not a missing value and a number."""
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long document
    with open(path, "rb") as head:
        _starts_with(head.read(4096), path)
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise UserError(Problem(f"{path}:1", "", None, f"has a header that is not csv: {error}")) from error
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield from _broken_csv(error, path, line, reader.line_num)
                continue
            if fields is None:
                return
            if fields:  # a blank line gives no fields
                yield _csv_row(header, fields, f"{path}:{line}")


def _csv_row(header: list[str], fields: list[str], place: str) -> Row:
    if any(_NOT_UTF8_BYTE.search(field) for field in fields):
        return Row(None, place, NOT_UTF8)
    if len(fields) != len(header):
        return Row(None, place, "has more or fewer fields than the header")
    return Row(dict(zip(header, fields, strict=True)), place)


def _broken_csv(error: csv.Error, path: str, first: int, last: int) -> Iterator[Row]:
    """A quote that is never closed swallows the lines below it, and each of them is lost: each is a bad row."""
    if "unexpected end of data" in str(error):
        for line in range(first, last + 1):
            yield Row(None, f"{path}:{line}", "stands in a quote that is never closed")
    else:
        yield Row(None, f"{path}:{first}", "has a quote in the middle of a field")


def _read_txt(path: str) -> Iterator[Row]:
    """Each line is a text of its own."""
    with open(path, "rb") as file:
        _starts_with(file.read(4096), path)
        file.seek(0)
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield Row({"text": line.decode("utf-8").rstrip("\r\n")}, f"{path}:{number}")
            except UnicodeDecodeError:
                yield Row(None, f"{path}:{number}", NOT_UTF8)


def _read_parquet(path: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            yield from _arrow_rows(file.iter_batches(batch_size=1024), path)
    except pyarrow.ArrowException as error:
        raise UserError(_not_arrow(path, "parquet", error)) from error


def _read_arrow(path: str) -> Iterator[Row]:
    """Both of Arrow's layouts: files (with a footer) and streams (what `datasets` saves)."""
    import pyarrow

    try:
        with pyarrow.memory_map(path) as source:
            try:
                reader = pyarrow.ipc.open_file(source)
            except pyarrow.ArrowInvalid:
                source.seek(0)
                yield from _arrow_rows(pyarrow.ipc.open_stream(source), path)
                return
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            yield from _arrow_rows(batches, path)
    except pyarrow.ArrowException as error:
        raise UserError(_not_arrow(path, "arrow", error)) from error


def _not_arrow(path: str, kind: str, error: Exception) -> Problem:
    return Problem(path, "", None, f"is not a whole {kind} file: {str(error).splitlines()[0]}", "write it again")


def _arrow_rows(batches: Any, path: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for value in batch.to_pylist():
            number += 1
            yield Row(without_nulls(value), f"{path}:{number}")


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A columnar file gives every object inside a row all the keys of its column; those it did not have come as None.

    >>> without_nulls({"input": None, "messages": [{"role": "user", "content": "hi", "tool_calls": None}]})
    {'input': None, 'messages': [{'role': 'user', 'content': 'hi'}]}
    """

    def tidy(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tidy(item) for key, item in value.items() if item is not None}
        return [tidy(item) for item in value] if isinstance(value, list) else value

    return {column: tidy(value) for column, value in row.items()}
