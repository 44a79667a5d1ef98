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

from burnish.data.broken import (
    CUT_OFF,
    NOT_JSON,
    NOT_UTF8_BYTE,
    TWICE,
    escaped_bytes,
    json_reason,
    not_utf8_reason,
    remedy_for,
    wrong_content,
)
from burnish.data.columnar import arrow_rows, parquet_rows
from burnish.data.values import kind_of
from burnish.errors import Problem, UserError

FILE_TYPES = ("json", "jsonl", "csv", "parquet", "arrow", "txt")

_HEAD = 4096  # bytes that tell what a file is
_GAP = re.compile(r"[\s,]*")  # between two rows of an array or of a stream of objects
_BLANK = re.compile(r"\s*")
_WINDOW = 2**20  # characters of a JSON file that are read at once
_LONGEST_WORD = 16  # -Infinity, \ud83d: what a window's end may cut and a decoder not understand


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
    kind = file_type(path)
    try:
        with open(path, "rb") as file:
            if wrong := wrong_content(file.read(_HEAD), path, kind):
                raise UserError(wrong)
        yield from readers[kind](path)
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        raise UserError(Problem(path, "", None, message, "see that this user may read it")) from error


def _read_jsonl(path: str) -> Iterator[Row]:
    with open(path, "rb") as file:
        first = file.readline(_HEAD).removeprefix(codecs.BOM_UTF8).strip()
        while not first and (line := file.readline(_HEAD)):
            first = line.strip()
        if first[:1] == b"[" or first == b"{":  # an array, or objects of many lines, under the wrong name
            yield from _read_json(path)
            return
        file.seek(0)
        keys = _Keys()
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield _parse_line(line, f"{path}:{number}", keys)


def _parse_line(line: bytes, place: str, keys: _Keys) -> Row:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return Row(None, place, not_utf8_reason(line))
    try:
        keys.twice = False
        return _row(keys.decoder.decode(text), place, keys)
    except (ValueError, RecursionError) as error:
        return Row(None, place, json_reason(error, len(text.rstrip())))


def _read_json(path: str) -> Iterator[Row]:
    """An array of objects, or objects one after the other, on one line each or on many."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        window = _Window(file)
        in_array = window.skip_gap() and window.text[window.at] == "["
        window.at += in_array
        ended_on, share_lines = 0, False  # where rows share lines, what stands behind a broken one cannot be found
        lost: Problem | None = None
        while window.skip_gap():
            place = f"{path}:{window.line()}"
            if in_array and window.text[window.at] == "]":
                window.at += 1
                if window.skip_gap(_BLANK):
                    message = "something stands after the end of the JSON array, and would be lost"
                    remedy = "write one array, or one row a line without brackets"
                    raise UserError(Problem(f"{path}:{window.line()}", "", None, message, remedy))
                return
            share_lines = share_lines or window.line() == ended_on
            if share_lines and lost:
                raise UserError(lost)
            try:
                value, content = window.decode()
            except (ValueError, RecursionError) as error:
                reason = window.reason(error)
                lost = lost or _lost_rest(error, reason, place, window.before)
                yield Row(None, place, reason)
                if share_lines or not window.skip_row():
                    if reason != CUT_OFF:
                        raise UserError(lost) from error
                    return
                continue
            ended_on = window.line()
            yield Row(None, place, not_utf8_reason(content)) if content else _row(value, place, window.keys)
        if in_array:
            yield Row(None, f"{path}:{window.line()}", CUT_OFF)  # no closing bracket


class _Keys:
    """Makes the objects of JSON, and notices a key that stands in one twice: json would keep the last one unsaid."""

    def __init__(self):
        self.twice = False
        self.decoder = json.JSONDecoder(object_pairs_hook=self.object)

    def object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            self.twice = True
        return made


class _Window:
    """The piece of a JSON text that is being read, from the row that `text[at]` begins. It grows to the right where a
    row reaches beyond it, and what was read is then left behind, so that a file of any size needs a row's memory.
    """

    def __init__(self, file: TextIO):
        self.keys = _Keys()
        self._file, self._decoder = file, self.keys.decoder
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

    def decode(self) -> tuple[Any, bytes]:
        """The value that begins here, and its bytes where they are not UTF-8. Raises what `raw_decode` raises."""
        while True:
            self.keys.twice = False
            try:
                value, end = self._decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self._may_go_on(error) and self._grow():
                    continue
                raise
            if end == len(self.text) and self._grow():  # a number may go on
                continue
            start, self.at = self.at, end
            is_utf8 = not NOT_UTF8_BYTE.search(self.text, start, end)
            return value, b"" if is_utf8 else escaped_bytes(self.text[start:end])

    def skip_row(self) -> bool:
        """Go on from a broken row to the one after it: the next line that opens an object at the same depth."""
        line = self.text[self.text.rfind("\n", 0, self.at) + 1 : self.at + 1]
        opening = f"\n{_indent(line)}{{"
        while (found := self.text.find(opening, self.at)) < 0:
            if not self._grow():
                return False
        self.at = found + len(opening) - 1
        return True

    def reason(self, error: Exception) -> str:
        """Why what begins here is no row; an encoding that is not UTF-8 may be what broke it."""
        line = self.text[self.at : max(self.text.find("\n", self.at), self.at)] or self.text[self.at :]
        if NOT_UTF8_BYTE.search(line):
            return not_utf8_reason(escaped_bytes(line))
        end_of_text = len(self.text.rstrip()) if self._is_last else len(self.text) + 1
        return json_reason(error, end_of_text)

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


def _lost_rest(error: Exception, reason: str, place: str, before: int) -> Problem:
    where = ""
    if isinstance(error, json.JSONDecodeError):
        where = f" at column {error.colno + (before if error.lineno == 1 else 0)}"
    message = f"{reason.replace(NOT_JSON, NOT_JSON + where)}, and no row after it can be told apart"
    return Problem(place, "", None, message, "mend it, or write one row a line")


def _row(value: Any, place: str, keys: _Keys) -> Row:
    if not isinstance(value, dict):
        kind = "null" if value is None else kind_of(value)
        return Row(None, place, f"is {kind}, not a JSON object")
    return Row(None, place, TWICE) if keys.twice else Row(value, place)


def _read_csv(path: str) -> Iterator[Row]:
    """Every value is a string, as it stands: `NA` and `007` are words, not a missing value and a number."""
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long document
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next((fields for fields in reader if fields), [])
        except csv.Error as error:
            raise UserError(Problem(f"{path}:1", "", None, f"has a header that is not csv: {error}")) from error
        if wrong := _wrong_header(header, f"{path}:{reader.line_num}"):
            raise UserError(wrong)
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


def _wrong_header(header: list[str], place: str) -> Problem | None:
    """What would spoil every row, or lose a column of them."""
    whole = ",".join(header)
    if NOT_UTF8_BYTE.search(whole):
        reason = not_utf8_reason(escaped_bytes(whole))
        return Problem(place, "", None, f"header {reason}", remedy_for(reason))
    if whole.lower().startswith("sep="):
        return Problem(place, "", whole, "is a line for Excel, not a header", "leave it out")
    if len(header) == 1 and (mark := next((mark for mark in ";\t|" if mark in whole), "")):
        return Problem(place, "header", whole, f"is separated by {mark!r}, not by commas", "save it with commas")
    twice = next((name for name in header if name and header.count(name) > 1), None)
    return Problem(place, "header", twice, "names two columns", "rename one of them") if twice else None


def _csv_row(header: list[str], fields: list[str], place: str) -> Row:
    whole = ",".join(fields)
    if NOT_UTF8_BYTE.search(whole):
        return Row(None, place, not_utf8_reason(escaped_bytes(whole)))
    if len(fields) != len(header):
        return Row(None, place, f"has {'more' if len(fields) > len(header) else 'fewer'} fields than the header")
    return Row(dict(zip(header, fields, strict=True)), place)


def _broken_csv(error: csv.Error, path: str, first: int, last: int) -> Iterator[Row]:
    """A quote that is not closed where it should be swallows the lines below it: each is lost, and is a bad row."""
    if "unexpected end of data" in str(error):
        reason = "stands in a quote that is never closed"
    elif first < last:
        reason = "stands in a quote that ends in the middle of a field"
    else:
        reason = "has a quote in the middle of a field"
    return (Row(None, f"{path}:{line}", reason) for line in range(first, last + 1))


def _read_txt(path: str) -> Iterator[Row]:
    """Each line is a text of its own."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                yield Row({"text": line.decode("utf-8").rstrip("\r\n")}, f"{path}:{number}")
            except UnicodeDecodeError:
                yield Row(None, f"{path}:{number}", not_utf8_reason(line))


def _read_parquet(path: str) -> Iterator[Row]:
    return _numbered(parquet_rows(path), path)


def _read_arrow(path: str) -> Iterator[Row]:
    return _numbered(arrow_rows(path), path)


def _numbered(values: Iterator[dict[str, Any] | str], path: str) -> Iterator[Row]:
    """A row that cannot be read comes as its reason."""
    for number, value in enumerate(values, 1):
        place = f"{path}:{number}"
        yield Row(None, place, value) if isinstance(value, str) else Row(value, place)
