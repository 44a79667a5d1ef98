"""What is wrong with a file or with a row of one, in the words that a person is told. No file is opened here.

    {'a': 1}                         is not valid JSON: texts stand in single quotes
    version https://git-lfs…         is a pointer of Git LFS, not the file itself; run git lfs pull
    {"a": "\\xc4\\xe3"}              is not UTF-8, it may be GBK

A reason is the same for all rows with one fault, so that they can be counted; what to do about it is `remedy_for` it.
"""

from __future__ import annotations

import codecs
import json
import re

from burnish.errors import Problem

CUT_OFF = "JSON is cut off"
NOT_JSON = "is not valid JSON"
NOT_UTF8 = "is not UTF-8"
MAYBE_GBK = f"{NOT_UTF8}, it may be GBK"
NO_SUCH_COLUMN = "has no column"  # how that reason begins
AROUND_ROWS = "is one object around the rows, which stand under"
TWICE = "has the same key twice"
UNREADABLE = "holds a value that cannot be read"

NOT_UTF8_BYTE = re.compile("[\udc80-\udcff]")  # what errors="surrogateescape" makes of a byte that is not UTF-8

_CAUSES = {  # words of Python's json → ours
    "Expecting ',' delimiter": "a comma is missing, or a quote inside a text has no backslash",
    "Expecting ':' delimiter": "a colon is missing",
    "Expecting property name": "a key stands without double quotes",
    "Expecting value": "a value is missing, or stands without double quotes",
}
_HIGH_BYTES = re.compile(rb"[\x80-\xff]+")
_REMEDIES = {  # what stands in a reason → what to do
    MAYBE_GBK: "save the file as UTF-8: iconv -f GB18030 -t UTF-8",
    NOT_UTF8: "save the file as UTF-8",
    CUT_OFF: "see that the file is whole, and in jsonl each row on one line",
    "a control character": "write it as \\n, \\t or \\u0001",
    "a null byte": "take it out",
    "a backslash": "write it twice",
    "single quotes": "use double quotes",
    "a comma stands": "leave it out",
    "a comment": "leave it out",
    "are Python's": "write null, true or false",
    "a second value": "write one row a line",
    "not a JSON object": 'write a row as {"column": "text"}',
    TWICE: "rename one of them",
    AROUND_ROWS: "save that list by itself",
    NO_SUCH_COLUMN: "name the columns in dataset_info.json",
    UNREADABLE: "mend that column, or leave it out",
    "of unknown role": "name the roles under tags in dataset_info.json",
    "roles do not alternate": "mend the order of its turns",
    "begins with": "mend the order of its turns",
    "a text without an answer": "stage pt trains on texts",
    "a number, not text": "write it in quotes",
    "not text": "write one text",
    "a turn has no": "name its keys under tags in dataset_info.json",
    "has no assistant turn": "end it with an answer",
    "is not the first": "put it first",
    "history is not": 'write it as [["question", "answer"]]',
    "is not JSON": "write it as json.dumps does",
    "a list of turns": 'write it as [{"role": "user", "content": "text"}]',
    "a tool without a name": 'write it as {"name": "f", "parameters": {}}',
    "no function name": 'write it as {"name": "f", "arguments": {}}',
    "half a surrogate": "write the character whole",
    "nested too deeply": "write it flatter",
    "is empty": "give it a text, or drop the row",
    "has more fields": "put fields that hold a comma in double quotes",
    "has fewer fields": "give every row all columns",
    "has a quote in the middle": 'write a quote inside a quoted field as ""',
    "stands in a quote": "close it, in the first of these lines",
}


def remedy_for(reason: str) -> str:
    return next((remedy for words, remedy in _REMEDIES.items() if words in reason), "")


# ---- a row -------------------------------------------------------------------------------------------------------


def json_reason(error: Exception, end_of_text: int) -> str:
    """Why a text is no JSON. `end_of_text`: where its last word ends."""
    if isinstance(error, RecursionError):
        return "JSON is nested too deeply"
    if not isinstance(error, json.JSONDecodeError):
        return NOT_JSON  # a number of thousands of digits
    if error.pos >= end_of_text or error.msg.startswith("Unterminated string"):
        return CUT_OFF
    cause = _cause(error.msg, error.doc[max(error.pos - 80, 0) : error.pos].rstrip(), error.doc[error.pos :][:80])
    return f"{NOT_JSON}: {cause}" if cause else NOT_JSON


def _cause(message: str, before: str, rest: str) -> str:
    if message.startswith("Invalid control character"):
        return "a null byte stands in it" if rest[:1] == "\0" else "a control character stands in a text"
    if message.startswith(("Invalid \\escape", "Invalid \\u")):
        return "a backslash in a text is no escape"
    if rest.startswith("\0"):
        return "a null byte stands in it"
    if rest.startswith(("//", "/*", "#")):
        return "a comment stands in it"
    if rest.startswith("'"):
        return "texts stand in single quotes"
    if re.match(r"(None|True|False)\b", rest):
        return "None, True and False are Python's"
    if message == "Extra data":
        return "a comma stands after it" if rest.rstrip() == "," else "a second value stands on its line"
    if re.match(r",\s*[}\]]", rest) or (before.endswith(",") and rest[:1] in "}]"):
        return "a comma stands before a closing bracket"
    return next((cause for start, cause in _CAUSES.items() if message.startswith(start)), "")


def not_utf8_reason(content: bytes) -> str:
    """Chinese in GBK (and its kin) comes in pairs of high bytes; single ones are of some other encoding."""
    runs = _HIGH_BYTES.findall(content)
    try:
        content.decode("gb18030")
    except UnicodeDecodeError:
        return NOT_UTF8
    return MAYBE_GBK if all(len(run) % 2 == 0 for run in runs) else NOT_UTF8


def escaped_bytes(text: str) -> bytes:
    """The bytes that a text was read from with errors="surrogateescape"."""
    return text.encode("utf-8", "surrogateescape")


# ---- a file ------------------------------------------------------------------------------------------------------


def wrong_content(head: bytes, path: str, kind: str) -> Problem | None:
    """What a file is, told from its beginning, where it is not of the kind that its name says."""
    if kind in _BEGINNINGS and head.startswith(_BEGINNINGS[kind]):
        return None
    for beginning, message, remedy in _OTHER_FILES:
        if head.startswith(beginning):
            return Problem(path, "", None, message, remedy)
    if kind in _BEGINNINGS:
        return None
    wide = _wide_encoding(head)
    if wide:
        return Problem(path, "", None, f"is {wide}", "save it as UTF-8")
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if kind in ("json", "jsonl", "csv") and text[:1] == b"<":
        return Problem(path, "", None, "is a web page or XML, not data", "download the file itself")
    if kind in ("jsonl", "txt") and b"\n" not in head and b"\r" in head.rstrip():
        return Problem(path, "", None, "ends its lines with \\r alone", "convert the line ends to \\n")
    if kind == "json" and text and text[:1] not in b'[{"' and not re.match(rb"[-\d]|null\b|true\b|false\b", text):
        return Problem(f"{path}:{_line_of_text(head)}", "", None, f"{_shown(text)} is no JSON", _begin(text))
    return None


_BEGINNINGS = {"parquet": b"PAR1", "arrow": b"ARROW1"}
_OTHER_FILES = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file itself", "run git lfs pull"),
    (b"PAR1", "is a parquet file", "name it .parquet"),
    (b"ARROW1", "is an arrow file", "name it .arrow"),
    (b"PK\x03\x04", "is a zip archive, or a workbook of Excel", "unpack it, or save it as csv in UTF-8"),
    (b"\xd0\xcf\x11\xe0", "is a workbook of Excel", "save it as csv in UTF-8"),
    (b"\x1f\x8b", "is compressed (gzip)", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "is compressed (zstd)", "unpack it"),
    (b"SQLite format 3", "is a database", "save its rows as jsonl"),
)


def _wide_encoding(head: bytes) -> str:
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    few = head[:256]
    odd, even = few[1::2].count(0), few[::2].count(0)
    return "UTF-16" if max(odd, even) * 4 > len(few[1::2]) > 1 and min(odd, even) * 4 < max(odd, even) else ""


def _line_of_text(head: bytes) -> int:
    text = head.removeprefix(codecs.BOM_UTF8)
    return 1 + text[: len(text) - len(text.lstrip())].count(b"\n")


def _shown(text: bytes) -> str:
    line = text.splitlines()[0].decode("utf-8", "replace")
    return repr(line[:30] + "…" if len(line) > 30 else line)


def _begin(text: bytes) -> str:
    if text.startswith((b"//", b"/*", b"#")):
        return "JSON has no comments: leave them out"
    return "write a list of rows in [ ], or one row in { } a line"
