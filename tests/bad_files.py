"""Broken files as people have them, and what each must be told: the table that test_bad_data.py goes through.

A case writes one file (or a folder, or dataset_info.json) and names what is said of it: `told` is how a line begins,
with @ in place of the file's path. `rows` and `used` are what the file holds and what of it can be trained on; None
where the file is refused as a whole, so that none of it is trained on.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

Write = Callable[[Path], Any]

ROW = '{"instruction": "question", "output": "answer"}\n'
ZH = '{"instruction": "你好", "output": "世界很大"}\n'
CHAT = '{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}\n'
OPENAI = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}\n'
CSV = "instruction,output\n"


class Case(NamedTuple):
    file: str
    content: str | bytes | Write
    told: str  # "" where nothing is wrong
    rows: int | None
    used: int | None
    words: tuple[str, ...] = ()
    status: int = 1


def bad(file: str, content: str | bytes | Write, told: str, rows: int, used: int, *words: str) -> Case:
    """Some rows cannot be used, and more than max_bad_rows allows."""
    return Case(file, content, told, rows, used, words)


def refused(file: str, content: str | bytes | Write, told: str, *words: str) -> Case:
    """Nothing is read past what is wrong."""
    return Case(file, content, told, None, None, words)


def mistaken(file: str, content: str | bytes | Write, told: str, *words: str) -> Case:
    """Told before a file of data is opened: a mistake of the configuration."""
    return Case(file, content, told, None, None, words, 2)


def fine(
    file: str, content: str | bytes | Write, rows: int, *words: str, told: str = "", used: int | None = None
) -> Case:
    """What looks odd, and is read."""
    return Case(file, content, told, rows, rows if used is None else used, words, 0)


def one(*, good: str = ROW, **columns: Any) -> str:
    """A good row, and below it one of these columns."""
    return good + json.dumps(columns, ensure_ascii=False) + "\n"


def turns(*pairs: tuple[Any, Any], **columns: Any) -> str:
    return one(good=CHAT, conversations=[{"from": role, "value": text} for role, text in pairs], **columns)


def messages(*them: dict[str, Any], **columns: Any) -> str:
    return one(good=OPENAI, messages=list(them), **columns)


def user(content: Any = "hi") -> dict[str, Any]:
    return {"role": "user", "content": content}


def calls(*given: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": call} for call in given]}


ENCODINGS = {
    "utf-8 with a byte order mark": fine("x.jsonl", b"\xef\xbb\xbf" + ROW.encode(), 1),
    "utf-16": refused("x.jsonl", ROW.encode("utf-16"), "@: is UTF-16; save it as UTF-8"),
    "utf-16 without a mark": refused("x.json", f"[{ROW}]".encode("utf-16-be"), "@: is UTF-16; save it as UTF-8"),
    "utf-32": refused("x.csv", CSV.encode("utf-32"), "@: is UTF-32; save it as UTF-8"),
    "gbk in jsonl": bad(
        "x.jsonl", ROW.encode() + (ZH * 2).encode("gbk"), "@:2: is not UTF-8, it may be GBK (and 1 more row", 3, 1
    ),
    "gb18030 in json": bad(
        "x.json", f"[\n{ZH},\n{ZH}]".encode("gb18030"), "@:2: is not UTF-8, it may be GBK (and 1 more row", 2, 0
    ),
    "gbk in broken json": bad(
        "x.json",
        f'[\n{ROW},\n{{"instruction": "你好"世界,\n{{"output": 1}}]'.encode("gbk"),
        "@:4: is not UTF-8, it may be GBK; save the file as UTF-8: iconv",
        3,
        1,
    ),
    "gbk in csv": bad("x.csv", f"{CSV}你好,世界\n".encode("gbk"), "@:2: is not UTF-8, it may be GBK; save", 1, 0),
    "gbk in a csv header": refused(
        "x.csv", "问题,回答\n1,2\n".encode("gbk"), "@:1: header is not UTF-8, it may be GBK"
    ),
    "gbk in txt": bad("x.txt", "你好\nok\n".encode("gbk"), "@:1: is not UTF-8, it may be GBK; save", 2, 1, "stage=pt"),
    "latin-1": bad("x.jsonl", ROW.encode() + ROW.replace("q", "é").encode("latin-1"), "@:2: is not UTF-8; save", 2, 1),
}

JSON = {
    "lines in json": fine("x.json", ROW * 3, 3),
    "an array in jsonl": fine("x.jsonl", f"[\n{ROW},\n{ROW}]", 2),
    "objects of many lines": fine("x.json", '{\n "instruction": "q",\n "output": "a"\n}\n' * 2, 2),
    "objects of many lines in jsonl": fine("x.jsonl", '{\n "instruction": "q",\n "output": "a"\n}\n' * 2, 2),
    "a comma before ]": fine("x.json", f"[\n{ROW},\n{ROW},\n]\n", 2),
    "a comma before }": bad(
        "x.json",
        f'[\n{{"instruction": "q", "output": "a",}},\n{ROW}]',
        "@:2: is not valid JSON: a comma stands before a closing bracket; leave it out",
        2,
        1,
    ),
    "a comma after each line": bad(
        "x.jsonl",
        ROW + ROW.replace("}\n", "},\n"),
        "@:2: is not valid JSON: a comma stands after it; leave it out",
        2,
        1,
    ),
    "single quotes": bad(
        "x.jsonl",
        ROW + ROW.replace('"', "'"),
        "@:2: is not valid JSON: texts stand in single quotes; use double quotes",
        2,
        1,
    ),
    "None of Python": bad(
        "x.jsonl",
        ROW + '{"instruction": None, "output": "a"}',
        "@:2: is not valid JSON: None, True and False are Python's; write null, true or false",
        2,
        1,
    ),
    "NaN": bad("x.jsonl", ROW + '{"instruction": "q", "output": NaN}', "@:2: output is NaN, not text; write", 2, 1),
    "Infinity": bad(
        "x.json", f'[{ROW},\n{{"instruction": "q", "output": -Infinity}}]', "@:3: output is a number", 2, 1
    ),
    "NaN in a column that is not read": fine("x.jsonl", ROW + '{"instruction": "q", "output": "a", "score": NaN}', 2),
    "a comment before the array": refused(
        "x.json", f"// rows\n[{ROW}]", "@:1: '// rows' is no JSON; JSON has no comments"
    ),
    "comments between rows": bad(
        "x.json",
        f"[\n// one\n{ROW},\n# two\n{ROW}]",
        "@:2: is not valid JSON: a comment stands in it (and 1 more row with it); leave it out",
        4,
        2,
    ),
    "a comment in jsonl": bad("x.jsonl", f"# rows\n{ROW}", "@:1: is not valid JSON: a comment stands in it", 2, 1),
    "a missing comma": bad(
        "x.json",
        f'[\n{{"instruction": "q" "output": "a"}},\n{ROW}]',
        "@:2: is not valid JSON: a comma is missing",
        2,
        1,
    ),
    "a quote inside a text": bad(
        "x.jsonl",
        ROW + '{"instruction": "say "hi"", "output": "a"}',
        "@:2: is not valid JSON: a comma is missing, or",
        2,
        1,
    ),
    "keys without quotes": bad(
        "x.jsonl", ROW + '{instruction: "q"}', "@:2: is not valid JSON: a key stands without double quotes", 2, 1
    ),
    "a backslash": bad(
        "x.jsonl",
        ROW + r'{"instruction": "\alpha", "output": "C:\data"}',
        "@:2: is not valid JSON: a backslash in a text is no escape; write it twice",
        2,
        1,
    ),
    "the same key twice": bad(
        "x.jsonl",
        ROW + '{"instruction": "q", "output": "a", "output": "b"}',
        "@:2: has the same key twice; rename one of them",
        2,
        1,
    ),
    "the same key twice, in an array": bad(
        "x.json",
        f'[{ROW}, {{"instruction": "q", "output": "a", "output": "b"}},\n{ROW}]',
        "@:2: has the same key twice",
        3,
        2,
    ),
    "half a surrogate pair": bad(
        "x.jsonl",
        one(instruction="q", output="x").replace("x", r"\ud800"),
        "@:2: output holds half a surrogate pair; write",
        2,
        1,
    ),
    "half a surrogate pair as a name": fine(
        "x.jsonl", r'{"instruction": "q", "output": "a", "\ud800": 1}', 1, told=r"  columns that are not read: \ud800"
    ),
    "a null byte as it is": bad(
        "x.jsonl", ROW + ROW.replace("q", "\0"), "@:2: is not valid JSON: a null byte stands in it; take it out", 2, 1
    ),
    "a null byte as an escape": bad(
        "x.jsonl", one(instruction="q", output="a\0b"), "@:2: output holds a null byte; take it out", 2, 1
    ),
    "null bytes at the end": bad("x.jsonl", ROW.encode() + bytes(64), "@:2: is not valid JSON: a null byte", 2, 1),
    "a control character": bad(
        "x.jsonl",
        ROW + ROW.replace("q", "\x01"),
        "@:2: is not valid JSON: a control character stands in a text; write",
        2,
        1,
    ),
    "a line break in a text": bad(
        "x.json",
        f'[\n{ROW},\n{{"instruction": "q\nr", "output": "a"}},\n{ROW}]',
        r"@:4: is not valid JSON: a control character stands in a text; write it as \n",
        3,
        2,
    ),
    "windows line ends": bad("x.jsonl", ROW.replace("\n", "\r\n") * 2 + "{x\r\n", "@:3: is not valid JSON", 3, 2),
    "carriage returns alone": refused(
        "x.jsonl", ROW.replace("\n", "\r") * 3, r"@: ends its lines with \r alone; convert"
    ),
    "line separators in a text": bad(
        "x.jsonl", ROW.replace("q", "\u2028\x85\x0b".replace("\x0b", "")) + "{", "@:2: JSON is cut off", 2, 1
    ),
    "a file that ends in a row": bad(
        "x.json", f'[\n{ROW},\n{{"instruction": "q", "outp', "@:4: JSON is cut off; see that", 2, 1
    ),
    "a last line that is cut off": bad(
        "x.jsonl", ROW + '{"instruction": "q", "outp', "@:2: JSON is cut off; see that", 2, 1
    ),
    "an array of one line, broken": refused(
        "x.json",
        f'[{ROW.strip()}, {{"instruction": b}}, {ROW.strip()}]',
        "@:1: is not valid JSON at column 67: a value is missing",
    ),
    "words after the array": refused(
        "x.json", f"[{ROW}]\nend", "@:3: something stands after the end of the JSON array"
    ),
    "two arrays": refused(
        "x.json", f"[{ROW}]\n[{ROW}]", "@:3: something stands after the end of the JSON array, and would be lost"
    ),
    "nested too deeply": bad("x.jsonl", ROW + '{"a": ' + "[" * 100_000, "@:2: JSON is nested too deeply", 2, 1),
    "nested up to what json takes": fine(
        "x.jsonl", ROW + '{"instruction": "q", "output": "a", "x": ' + "[" * 300 + "]" * 300 + "}", 2
    ),
    "no byte": refused("x.json", "", "@: holds no rows; give a file with rows"),
    "blanks alone": refused("x.jsonl", " \n\n\t\n", "@: holds no rows"),
    "an empty array": refused("x.json", "[]", "@: holds no rows"),
    "an empty object": bad("x.json", "{}", "@:1: has no column 'instruction' (it is empty)", 1, 0),
    "null": bad("x.json", "null", "@:1: is null, not a JSON object; write a row as", 1, 0),
    "a string": bad("x.json", '"text"', "@:1: is text, not a JSON object", 1, 0),
    "a number": bad("x.json", "17", "@:1: is a number, not a JSON object", 1, 0),
    "an array of texts": bad("x.json", '["a",\n"b"]', "@:1: is text, not a JSON object (and 1 more row with it)", 2, 0),
    "rows inside an object": bad(
        "x.json",
        f'{{"version": 1, "data": [{ROW}, {ROW}]}}',
        "@:1: is one object around the rows, which stand under 'data'; save that list by itself",
        1,
        0,
    ),
    "conversations inside an object": bad(
        "x.json", f'{{"train": [{CHAT}]}}', "@:1: is one object around the rows, which stand under 'train'", 1, 0
    ),
    "a web page": refused(
        "x.json", "<!DOCTYPE html>\n<html>", "@: is a web page or XML, not data; download the file itself"
    ),
    "a pointer of git lfs": refused(
        "x.jsonl", "version https://git-lfs.github.com/spec/v1\n", "@: is a pointer of Git LFS"
    ),
    "gzip under another name": refused("x.json", gzip.compress(ROW.encode()), "@: is compressed (gzip); unpack it"),
    "a workbook under another name": refused(
        "x.csv", b"PK\x03\x04\x14\x00", "@: is a zip archive, or a workbook of Excel; unpack"
    ),
    "parquet under another name": refused("x.json", b"PAR1\x15\x04", "@: is a parquet file; name it .parquet"),
}

TABLES = {
    "commas, quotes and line breaks in quotes": fine("x.csv", f'{CSV}"a, ""b""\nc",d\nNA,007\n', 2),
    "a row after one of several lines": bad(
        "x.csv", f'{CSV}"a\nb",c\n,\n', "@:4: output is empty; give it a text", 2, 1
    ),
    "no header": bad(
        "x.csv",
        "what is it,this\nand that,those\n",
        "@:2: has no column 'instruction' (it has 'this', 'what is it')",
        1,
        0,
    ),
    "a name twice in the header": refused(
        "x.csv", "instruction,output,output\nq,a,b\n", "@:1: header 'output' names two columns; rename one"
    ),
    "a header with blanks": bad(
        "x.csv", "instruction, output\nq, a\n", "@:2: has no column 'output' (did you mean ' output'?)", 1, 0
    ),
    "a column without a name": fine(
        "x.csv", ",instruction,output\n0,q,a\n", 1, told="  columns that are not read: '' (x.csv)"
    ),
    "one field more": bad(
        "x.csv", f"{CSV}q,a\nq,a,b\n", "@:3: has more fields than the header; put fields that hold a comma in", 2, 1
    ),
    "one field fewer": bad(
        "x.csv", f"{CSV}q,a\nq\n", "@:3: has fewer fields than the header; give every row all", 2, 1
    ),
    "semicolons": refused(
        "x.csv",
        "instruction;output\nq;a\n",
        "@:1: header 'instruction;output' is separated by ';', not by commas; save",
    ),
    "tabs": refused(
        "x.csv", "instruction\toutput\nq\ta\n", r"@:1: header 'instruction\toutput' is separated by '\t', not by commas"
    ),
    "a line for Excel": refused(
        "x.csv", f"sep=,\n{CSV}q,a\n", "@:1: 'sep=,' is a line for Excel, not a header; leave it out"
    ),
    "blank lines first": fine("x.csv", f"\n\n{CSV}q,a\n", 1),
    "a header alone": refused("x.csv", CSV, "@: holds no rows"),
    "an open quote": bad(
        "x.csv",
        f'{CSV}q,a\nq,"a\nq,b\n',
        "@:3: stands in a quote that is never closed (and 1 more row with it); close",
        3,
        1,
    ),
    "a quote in a field": bad(
        "x.csv", f'{CSV}q,"a" b\nq,b\n', "@:2: has a quote in the middle of a field; write a quote inside", 2, 1
    ),
    "an empty cell": bad("x.csv", f"{CSV}q,\nq,a\n", "@:2: output is empty; give it a text, or drop the row", 2, 1),
    "a null byte in csv": bad("x.csv", f"{CSV}q\0,a\nq,a\n", "@:2: instruction holds a null byte; take it out", 2, 1),
    "turns in a cell": bad(
        "x.csv",
        'conversations\n"[{""from"": ""human"", ""value"": ""a""}, {""from"": ""gpt"", ""value"": ""b""}]"\nhi\n',
        "@:3: conversations is not JSON; write it as",
        2,
        1,
    ),
    "texts for sft": bad(
        "x.txt",
        "one\n\ntwo\n",
        "@:1: is a text without an answer (and 1 more row with it); stage pt trains on texts",
        2,
        0,
    ),
    "a null byte in txt": bad("x.txt", "one\n\ntw\0o\n", "@:3: text holds a null byte; take it out", 2, 1, "stage=pt"),
    "carriage returns alone in txt": refused("x.txt", "one\rtwo\r", r"@: ends its lines with \r alone", "stage=pt"),
    "another column for pt": bad(
        "x.jsonl",
        '{"text": "a"}\n{"content": "b"}\n',
        "@:2: has no column 'text' (it has 'content'); name the",
        2,
        1,
        "stage=pt",
    ),
    "conversations for pt": refused(
        "x.jsonl", CHAT, "@: holds conversations, and stage pt trains on texts; use stage sft", "stage=pt"
    ),
}


def parquet(**columns: Any) -> Write:
    return lambda path: pyarrow.parquet.write_table(pyarrow.table(columns), path)


def cut(size: int) -> Write:
    def write(path: Path) -> None:
        parquet(instruction=["q"] * 50, output=["a"] * 50)(path)
        path.write_bytes(path.read_bytes()[:size])

    return write


def two_columns_of_one_name(path: Path) -> None:
    columns = [pyarrow.array([text]) for text in "qab"]
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, ["instruction", "output", "output"]), path)


def spoilt_pages(path: Path) -> None:
    parquet(instruction=[f"{n}" * 90 for n in range(900)], output=["a"] * 900)(path)
    content = bytearray(path.read_bytes())
    content[60:200] = b"\xff" * 140
    path.write_bytes(bytes(content))


def arrow(cut: int | None = None) -> Write:
    def write(path: Path) -> None:
        table = pyarrow.table({"instruction": ["q"] * 50, "output": ["a"] * 50})
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
        path.write_bytes(path.read_bytes()[:cut])

    return write


_TIME = datetime(2024, 1, 1, tzinfo=UTC)
_NOT_UTF8 = pyarrow.array([b"a", b"\xff\xfe"]).view(pyarrow.string())
_FAR = pyarrow.array([2**62, 0], pyarrow.timestamp("us"))
_TURN = pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string()))
_TURNS_AS_MAPS = pyarrow.array([[[("from", "human"), ("value", "a")], [("from", "gpt"), ("value", "b")]]], _TURN)

COLUMNAR = {
    "a struct": bad(
        "x.parquet",
        parquet(instruction=["q", "q"], output=[{"a": 1}, {"a": 2}]),
        "@:1: output is an object, not text (and 1",
        2,
        0,
    ),
    "a list": bad(
        "x.parquet",
        parquet(instruction=[["q"]], output=["a"]),
        "@:1: instruction is a list, not text; write one text",
        1,
        0,
    ),
    "a map": bad(
        "x.parquet",
        parquet(instruction=pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())), output=["a"]),
        "@:1: instruction is an object, not text",
        1,
        0,
    ),
    "turns as maps": fine("x.parquet", parquet(conversations=_TURNS_AS_MAPS), 1),
    "a time": bad("x.parquet", parquet(instruction=["q"], output=[_TIME]), "@:1: output is a time, not text", 1, 0),
    "a decimal": bad(
        "x.parquet",
        parquet(instruction=["q"], output=[Decimal("1.5")]),
        "@:1: output is a number, not text; write it in quotes",
        1,
        0,
    ),
    "bytes": bad("x.parquet", parquet(instruction=["q"], output=[b"a"]), "@:1: output is bytes, not text", 1, 0),
    "numbers": bad("x.parquet", parquet(instruction=["q"], output=[1]), "@:1: output is a number, not text", 1, 0),
    "an empty value": bad(
        "x.parquet", parquet(instruction=["q", "q"], output=["a", None]), "@:2: output is empty", 2, 1
    ),
    "strings that are not utf-8": bad(
        "x.parquet", parquet(instruction=["q", "q"], output=_NOT_UTF8), "@:2: output is not UTF-8; save", 2, 1
    ),
    "a time beyond Python's": bad(
        "x.parquet",
        parquet(instruction=["q", "q"], output=["a", "a"], at=_FAR),
        "@:1: at holds a value that cannot be read; mend that column, or leave it out",
        2,
        1,
    ),
    "times that are not read": fine(
        "x.parquet", parquet(instruction=["q"], output=["a"], at=[_TIME]), 1, told="  columns that are not read: at"
    ),
    "two columns of one name": refused(
        "x.parquet", two_columns_of_one_name, "@: 'output' names two columns; rename one of them"
    ),
    "parquet without rows": refused(
        "x.parquet", parquet(instruction=pyarrow.array([], pyarrow.string())), "@: holds no rows"
    ),
    "parquet without its end": refused("x.parquet", cut(-20), "@: is not a whole parquet file: "),
    "parquet of no bytes": refused("x.parquet", b"", "@: is not a whole parquet file: "),
    "parquet with spoilt pages": refused("x.parquet", spoilt_pages, "@: is not a whole parquet file: "),
    "a pointer for parquet": refused(
        "x.parquet",
        "version https://git-lfs.github.com/spec/v1\n",
        "@: is a pointer of Git LFS, not the file itself; run",
    ),
    "arrow": fine("x.arrow", arrow(), 50),
    "arrow without its end": refused("x.arrow", arrow(-700), "@: is not a whole arrow file: "),
    "arrow of no bytes": refused("x.arrow", b"", "@: is not a whole arrow file: "),
}

COLUMNS = {
    "a misspelt column": bad(
        "x.jsonl",
        one(instruction="q", ouput="a"),
        "@:2: has no column 'output' (did you mean 'ouput'?); name the columns",
        2,
        1,
    ),
    "capitals": bad(
        "x.jsonl",
        one(Instruction="q", output="a"),
        "@:2: has no column 'instruction' (did you mean 'Instruction'?)",
        2,
        1,
    ),
    "other columns": bad(
        "x.jsonl",
        '{"question": "q", "answer": "a"}',
        "@:1: has no column 'instruction' (it has 'answer', 'question'); name the columns in dataset_info.json",
        1,
        0,
    ),
    "a list for a text": bad(
        "x.jsonl", one(instruction=["q"], output="a"), "@:2: instruction is a list, not text", 2, 1
    ),
    "a number for a text": bad(
        "x.jsonl", one(instruction="q", output=7), "@:2: output is a number, not text; write it in quotes", 2, 1
    ),
    "numbers as texts": fine("x.jsonl", one(instruction="12", output="007"), 2),
    "true for a text": bad(
        "x.jsonl", one(instruction="q", output=True), "@:2: output is true or false, not text", 2, 1
    ),
    "null for a text": bad("x.jsonl", one(instruction="q", output=None), "@:2: output is empty", 2, 1),
    "an object for a text": bad(
        "x.jsonl", one(instruction="q", output={"text": "a"}), "@:2: output is an object, not text", 2, 1
    ),
    "no question": bad("x.jsonl", one(instruction="", output="a"), "@:2: instruction is empty; give it a text", 2, 1),
    "a question in input alone": fine("x.jsonl", one(instruction="", input="q", output="a"), 2),
    "blanks for an answer": bad(
        "x.jsonl", one(instruction="q", output=" \n\t\u3000\xa0"), "@:2: output is empty", 2, 1
    ),
    "nothing to be seen for an answer": bad(
        "x.jsonl", one(instruction="q", output="\u200b \ufeff"), "@:2: output is empty", 2, 1
    ),
    "history of texts": bad(
        "x.jsonl",
        one(instruction="q", output="a", history=["b", "c"]),
        "@:2: history is not a list of pairs; write it as",
        2,
        1,
    ),
    "history of threes": bad(
        "x.jsonl",
        one(instruction="q", output="a", history=[["b", "c", "d"]]),
        "@:2: history is not a list of pairs",
        2,
        1,
    ),
    "history as words": bad("x.jsonl", one(instruction="q", output="a", history="b"), "@:2: history is not JSON", 2, 1),
    "an empty answer in history": bad(
        "x.jsonl", one(instruction="q", output="a", history=[["b", ""]]), "@:2: a turn of history is empty", 2, 1
    ),
    "tools that are not JSON": bad(
        "x.jsonl", one(instruction="q", output="a", tools="add"), "@:2: tools is not JSON", 2, 1
    ),
    "tools that are no list": bad(
        "x.jsonl", one(instruction="q", output="a", tools=7), "@:2: tools is a number, not a list", 2, 1
    ),
    "tools without a name": bad(
        "x.jsonl",
        one(instruction="q", output="a", tools='["add"]'),
        "@:2: tools holds a tool without a name; write",
        2,
        1,
    ),
}

CONVERSATIONS = {
    "the assistant first": bad(
        "x.jsonl",
        turns(("gpt", "a"), ("human", "b"), ("gpt", "c")),
        "@:2: begins with assistant, not with the user; mend the order",
        2,
        1,
    ),
    "two users": bad(
        "x.jsonl",
        turns(("human", "a"), ("human", "b"), ("gpt", "c")),
        "@:2: roles do not alternate: user after user; mend",
        2,
        1,
    ),
    "two assistants": bad(
        "x.jsonl",
        turns(("human", "a"), ("gpt", "b"), ("gpt", "c")),
        "@:2: roles do not alternate: assistant after assistant",
        2,
        1,
    ),
    "a last turn of the user": fine(
        "x.jsonl",
        turns(("human", "a"), ("gpt", "b"), ("human", "c")),
        2,
        told="  cut: turns after the last answer: 1 (first: @:2)",
    ),
    "no answer": bad("x.jsonl", turns(("human", "a")), "@:2: has no assistant turn; end it with an answer", 2, 1),
    "an unknown role": bad(
        "x.jsonl",
        turns(("human", "a"), ("bot", "b")),
        "@:2: has a turn of unknown role 'bot' (known: human, gpt, ",
        2,
        1,
    ),
    "roles of openai in sharegpt": bad(
        "x.jsonl",
        '{"conversations": [{"from": "user", "value": "a"}]}',
        "@:1: has a turn of unknown role 'user' (known: human, gpt, observation, function_call, system)",
        1,
        0,
    ),
    "a result before a call": bad(
        "x.jsonl",
        turns(("human", "a"), ("observation", "b"), ("gpt", "c")),
        "@:2: roles do not alternate: tool after user",
        2,
        1,
    ),
    "a result after words, as ReAct has it": fine(
        "x.jsonl", turns(("human", "a"), ("gpt", "Action: b"), ("observation", "c"), ("gpt", "d")), 2
    ),
    "a system turn in the middle": bad(
        "x.jsonl",
        turns(("human", "a"), ("system", "b"), ("gpt", "c")),
        "@:2: a system message is not the first; put it first",
        2,
        1,
    ),
    "a misspelt role key": bad(
        "x.jsonl",
        one(good=CHAT, conversations=[{"form": "human", "value": "a"}]),
        "@:2: a turn has no 'from' (did you mean 'form'?); name its keys under tags",
        2,
        1,
    ),
    "a misspelt text key": bad(
        "x.jsonl",
        one(good=CHAT, conversations=[{"from": "human", "valeu": "a"}]),
        "@:2: a turn has no 'value' (did you mean 'valeu'?)",
        2,
        1,
    ),
    "another text key": bad(
        "x.jsonl",
        '{"conversations": [{"from": "human", "content": "a"}]}',
        "@:1: a turn has no 'value' (it has 'content', 'from')",
        1,
        0,
    ),
    "no turns": bad("x.jsonl", one(good=CHAT, conversations=[]), "@:2: conversations is empty", 2, 1),
    "no turns in the first row": bad("x.jsonl", '{"conversations": []}\n' + CHAT, "@:1: conversations is empty", 2, 1),
    "null for messages in the first row": bad(
        "x.jsonl", '{"messages": null}\n' + OPENAI, "@:1: messages is empty", 2, 1
    ),
    "turns that are texts": bad(
        "x.jsonl",
        '{"conversations": ["a", "b"]}\n' + CHAT,
        "@:1: conversations holds a turn that is not an object",
        2,
        1,
    ),
    "words for turns": bad("x.jsonl", '{"conversations": "a"}\n' + CHAT, "@:1: conversations is not JSON", 2, 1),
    "one turn for turns": bad(
        "x.jsonl", one(good=OPENAI, messages=user()), "@:2: messages is an object, not a list", 2, 1
    ),
    "an empty answer": bad("x.jsonl", turns(("human", "a"), ("gpt", "")), "@:2: assistant turn is empty", 2, 1),
    "a number for an answer": bad(
        "x.jsonl", turns(("human", "a"), ("gpt", 7)), "@:2: a turn's value is a number, not text", 2, 1
    ),
    "a call that is not JSON": bad(
        "x.jsonl", turns(("human", "a"), ("function_call", "add(1)")), "@:2: a function call is not JSON", 2, 1
    ),
    "arguments that are not JSON": bad(
        "x.jsonl",
        messages(user(), calls({"name": "f", "arguments": "{x"})),
        "@:2: the argument text of a tool call is not JSON",
        2,
        1,
    ),
    "arguments that are a list": bad(
        "x.jsonl",
        messages(user(), calls({"name": "f", "arguments": "[1]"})),
        "@:2: the arguments of a tool call are not an object",
        2,
        1,
    ),
    "a call without a name": bad(
        "x.jsonl", messages(user(), calls({"arguments": "{}"})), "@:2: a tool call has no function name; write", 2, 1
    ),
    "a call of the user's": bad(
        "x.jsonl", messages({**calls({"name": "f"}), "role": "user"}), "@:2: a user turn holds tool calls", 2, 1
    ),
    "an image": bad(
        "x.jsonl",
        messages(user([{"type": "image_url"}])),
        "@:2: content holds a part of type 'image_url'; only text is read",
        2,
        1,
    ),
    "a turn without a role": bad(
        "x.jsonl", messages({"content": "a"}), "@:2: a turn has no 'role' (it has 'content')", 2, 1
    ),
    "a turn without content": bad(
        "x.jsonl",
        messages({"role": "user", "contents": "a"}),
        "@:2: a turn has no 'content' (did you mean 'contents'?)",
        2,
        1,
    ),
    "half a weight": bad(
        "x.jsonl",
        messages(user(), {"role": "assistant", "content": "a", "weight": 0.5}),
        "@:2: weight of a turn is neither 0 nor 1",
        2,
        1,
    ),
    "no turn with a weight": fine(
        "x.jsonl",
        messages(user(), {"role": "assistant", "content": "a", "weight": 0}),
        2,
        told="  dropped: nothing in it is trained: 1 (first: @:2)",
        used=1,
    ),
}

LENGTHS = {
    "a question beyond the cutoff": fine(
        "x.jsonl",
        one(instruction="word " * 99, output="a"),
        2,
        "cutoff_len=40",
        told="  cut: head of the last user message: 1 (first: @:2)",
    ),
    "an answer beyond the cutoff": fine(
        "x.jsonl",
        one(instruction="q", output="word " * 99),
        2,
        "cutoff_len=60",
        told="  cut: end of the answer: 1 (first: @:2)",
    ),
    "no room for an answer": fine(
        "x.jsonl",
        one(system="s " * 99, instruction="q", output="a"),
        2,
        "cutoff_len=40",
        told="  dropped: its prompt leaves no room for an answer: 1 (first: @:2)",
        used=1,
    ),
    "no room for any answer": Case(
        "x.jsonl",
        ROW * 3,
        "@:1: dropped: its prompt leaves no room for an answer (and 2 more samples with it)",
        3,
        0,
        ("cutoff_len=16",),
    ),
    "long ones left out": fine(
        "x.jsonl",
        one(instruction="q", output="word " * 99),
        2,
        "cutoff_len=60",
        "overlong=drop",
        told="  dropped: longer than cutoff_len: 1 (first: @:2)",
        used=1,
    ),
    "equal rows": fine(
        "x.jsonl",
        ROW + '{"output": "answer", "instruction": "question"}\n',
        2,
        told="  duplicates: 1 of the rows in files are equal to an earlier one",
    ),
    "rows of train in evaluation": fine(
        "x.jsonl", ROW, 2, "eval_dataset=x.jsonl", told="  in train too: 1 of 1 samples"
    ),
    "more bad rows than allowed": bad(
        "x.jsonl", ROW * 98 + "x\n" * 2, "@:99: is not valid JSON: a value is missing", 100, 98, "max_bad_rows=0.01"
    ),
    "as many bad rows as are allowed": fine(
        "x.jsonl",
        ROW * 99 + "x\n",
        100,
        "max_bad_rows=0.01",
        told="  bad row: is not valid JSON: a value is missing, or stands without double quotes: 1 (first: @:100)",
        used=99,
    ),
    "a number of bad rows": fine("x.jsonl", ROW + "x\n", 2, "max_bad_rows=1", told="  bad row: ", used=1),
    "bad rows allowed, and nothing else": Case(
        "x.jsonl",
        "x\n" * 2,
        "@:1: is not valid JSON: a value is missing, or stands without double quotes (and 1 more",
        2,
        0,
        ("max_bad_rows=5",),
    ),
    "all rows for evaluation": Case(
        "x.jsonl",
        ROW * 3,
        "data: val_size 3.0 would set aside all of 3 rows; give a smaller number",
        3,
        3,
        ("val_size=3",),
    ),
    "a bad row of a stream": bad("x.jsonl", ROW * 9 + "x\n", "@:10: is not valid JSON", 10, 9, "streaming=true"),
}


def in_folder(**files: str | Write) -> Write:
    """A folder of these files, each "a_jsonl" for a.jsonl; or what else stands there."""

    def write(path: Path) -> None:
        path.mkdir()
        for name, content in files.items():
            make(path / name.replace("_", ".", 1), content)

    return write


def make(path: Path, content: str | bytes | Write) -> None:
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def link(to: str) -> Write:
    return lambda path: path.symlink_to(to)


def pipe(path: Path) -> None:
    import os

    os.mkfifo(path)


FOLDERS = {
    "several types": fine(
        "set",
        in_folder(a_json=f"[{ROW}]", b_jsonl=ROW, c_csv=f"{CSV}q,a\n", README_md="#"),
        3,
        told="  left out: @/README.md is not a file of data",
    ),
    "several formats": bad(
        "set",
        in_folder(a_jsonl=ROW, b_jsonl=CHAT),
        "@/b.jsonl:1: has no column 'instruction' (it has 'conversations')",
        2,
        1,
    ),
    "a folder inside": fine(
        "set",
        in_folder(a_jsonl=ROW, b_json=in_folder(c_jsonl=ROW)),
        1,
        told="  left out: @/b.json is a folder, whose files are not read",
    ),
    "folders alone": mistaken(
        "set", in_folder(sub=in_folder(a_jsonl=ROW)), "@: is a folder without a file of data; it may hold json"
    ),
    "an empty folder": mistaken("set", in_folder(), "@: is a folder without a file of data"),
    "an empty file among others": fine("set", in_folder(a_jsonl="", b_jsonl=ROW), 1, told="  holds no rows: @/a.jsonl"),
    "a link to a file": fine("set", in_folder(a_jsonl=ROW, b_jsonl=link("a.jsonl")), 2),
    "a link to a folder": fine(
        "set", in_folder(a_jsonl=ROW, sub=link(".")), 1, told="  left out: @/sub is a folder, whose files are not read"
    ),
    "a link to nothing in a folder": mistaken(
        "set", in_folder(a_jsonl=ROW, b_jsonl=link("gone")), "@: holds what is no file: @/b.jsonl; take it out"
    ),
    "a link around in a folder": mistaken(
        "set", in_folder(a_jsonl=ROW, b_jsonl=link("b.jsonl")), "@: holds what is no file: @/b.jsonl"
    ),
    "a pipe in a folder": mistaken("set", in_folder(a_jsonl=ROW, b_jsonl=pipe), "@: holds what is no file: @/b.jsonl"),
    "a link to nothing": mistaken(
        "x.jsonl", link("gone.jsonl"), "@: is a link that leads to no file: @ → gone.jsonl; give the path"
    ),
    "a link around": mistaken("x.jsonl", link("x.jsonl"), "@: is a link that leads to no file"),
    "a pipe": mistaken("x.jsonl", pipe, "@: is neither a file nor a folder"),
    "a device": mistaken("x.jsonl", link("/dev/null"), "@: is neither a file nor a folder"),
    "a folder with the name of a file": fine("x.json", in_folder(a_jsonl=ROW), 1),
    "a name in Chinese, with a blank": bad("数据 集.jsonl", ROW + "{", "@:2: JSON is cut off", 2, 1),
    "a name with a colon": bad("a:12.jsonl", ROW + "{", "@:2: JSON is cut off", 2, 1),
    "a name with #": bad("a#b.csv", f"{CSV}q,\n", "@:2: output is empty", 1, 0),
    "a name in capitals": fine("X.JSONL", ROW, 1),
    "another type": mistaken(
        "x.xlsx",
        "PK",
        "@: is of a type that burnish does not read: not json, jsonl, csv, parquet, arrow, txt; save it as csv",
    ),
    "a packed file": mistaken(
        "x.json.gz",
        "",
        "@: is of a type that burnish does not read: not json, jsonl, csv, parquet, arrow, txt; unpack it",
    ),
    "no type": mistaken("rows", ROW, "@: is of a type that burnish does not read"),
}


def catalog(entry: Any) -> Write:
    """A catalog whose entry `set` this is; beside it a file of rows."""
    return raw_catalog(json.dumps({"set": entry}))


def raw_catalog(text: str | bytes) -> Write:
    def write(path: Path) -> None:
        make(path, text)
        make(path.with_name("rows.jsonl"), ROW + ROW.replace("answer", ""))

    return write


_INFO, _SET, _ROWS = "dataset_info.json", "dataset=set", {"file_name": "rows.jsonl"}

CATALOGS = {
    "an entry": Case(_INFO, catalog(_ROWS), "", 2, 1, (_SET,)),
    "a catalog with a byte order mark": Case(
        _INFO, raw_catalog(b"\xef\xbb\xbf" + json.dumps({"set": _ROWS}).encode()), "", 2, 1, (_SET,)
    ),
    "a catalog with a comma too many": mistaken(_INFO, raw_catalog('{"set": {},\n}'), "@:", _SET),
    "a catalog that is cut off": mistaken(
        _INFO, raw_catalog('{\n"set":'), "@:2: is not valid JSON: Expecting value, at column 7; mend", _SET
    ),
    "an empty catalog": mistaken(_INFO, raw_catalog(""), "@:1: is not valid JSON: Expecting value, at column 1", _SET),
    "a catalog that is a list": mistaken(
        _INFO, raw_catalog("[]"), '@: is not an object of names; write {"name": {"file_name"', _SET
    ),
    "a catalog that is null": mistaken(_INFO, raw_catalog("null"), "@: is not an object of names", _SET),
    "a catalog in utf-16": mistaken(
        _INFO, raw_catalog("{}".encode("utf-16")), "@: is not UTF-8; save it as UTF-8", _SET
    ),
    "a catalog in gbk": mistaken(_INFO, raw_catalog('{"集": {}}'.encode("gbk")), "@: is not UTF-8", _SET),
    "a catalog nested too deeply": mistaken(_INFO, raw_catalog("[" * 100_000), "@: is nested too deeply", _SET),
    "an unknown name": mistaken(
        _INFO, catalog(_ROWS), "command line: dataset 'sett' is not in @; did you mean 'set'?", "dataset=sett"
    ),
    "an entry that is a name": mistaken(
        _INFO, catalog("rows.jsonl"), "@: set 'rows.jsonl' is not an object; write {", _SET
    ),
    "a file that is not there": mistaken(
        _INFO, catalog({"file_name": "row.jsonl"}), "@: set.file_name 'row.jsonl' is not there: ", _SET
    ),
    "a misspelt key": mistaken(
        _INFO, catalog({"file_nam": "rows.jsonl"}), "@: set.file_nam is not known; did you mean 'file_name'?", _SET
    ),
    "no file": mistaken(_INFO, catalog({}), "@: set does not say where its rows lie; give file_name", _SET),
    "a number for a file": mistaken(_INFO, catalog({"file_name": 7}), "@: set.file_name 7 is not a name", _SET),
    "a misspelt format": mistaken(
        _INFO,
        catalog(_ROWS | {"formatting": "sharegtp"}),
        "@: set.formatting 'sharegtp' is not one of alpaca, sharegpt, openai; did you mean 'sharegpt'?",
        _SET,
    ),
    "a misspelt column key": mistaken(
        _INFO,
        catalog(_ROWS | {"columns": {"promt": "q"}}),
        "@: set.columns.promt is not known; did you mean 'prompt'?",
        _SET,
    ),
    "columns that are a list": mistaken(
        _INFO, catalog(_ROWS | {"columns": ["q"]}), "@: set.columns ['q'] is not an object", _SET
    ),
    "a misspelt tag": mistaken(
        _INFO,
        catalog(_ROWS | {"tags": {"rol_tag": "q"}}),
        "@: set.tags.rol_tag is not known; did you mean 'role_tag'?",
        _SET,
    ),
    "a text for a number": mistaken(
        _INFO,
        catalog(_ROWS | {"num_samples": "10"}),
        "@: set.num_samples '10' is not a number of rows; give 1 or more",
        _SET,
    ),
    "pairs of answers": mistaken(
        _INFO,
        catalog(_ROWS | {"ranking": True}),
        "@: set.ranking True pairs of answers are for stages rm and dpo",
        _SET,
    ),
    "images": mistaken(
        _INFO,
        catalog(_ROWS | {"columns": {"images": "i"}}),
        "@: set.columns.images 'i' cannot be used; burnish trains on text alone",
        _SET,
    ),
    "a script": mistaken(
        _INFO,
        catalog({"script_url": "x"}),
        "@: set.script_url 'x' names a loading script, which datasets no longer runs; save",
        _SET,
    ),
    "no column with answers": refused(
        _INFO,
        catalog(_ROWS | {"columns": {"prompt": "instruction"}}),
        "rows.jsonl: columns.response names columns, but none with answers; name it",
        _SET,
    ),
    "columns that the rows do not have": Case(
        _INFO,
        catalog(_ROWS | {"columns": {"prompt": "instruktion", "response": "output"}}),
        "rows.jsonl:1: has no column 'instruktion' (did you mean 'instruction'?) (and 1 more row with it)",
        2,
        0,
        (_SET,),
    ),
    "a format that the rows do not have": Case(
        _INFO,
        catalog(_ROWS | {"formatting": "sharegpt"}),
        "rows.jsonl:1: has no column 'conversations' (it has 'instruction', 'output')",
        2,
        0,
        (_SET,),
    ),
}

CASES = ENCODINGS | JSON | TABLES | COLUMNAR | COLUMNS | CONVERSATIONS | LENGTHS | FOLDERS | CATALOGS
