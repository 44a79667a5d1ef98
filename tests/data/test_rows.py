from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest

from burnish.data import rows
from burnish.data.rows import Row, read_rows
from burnish.errors import UserError


@pytest.fixture
def read(tmp_path):
    def read(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [Row(row.value, row.place.removeprefix(f"{path}:"), row.reason) for row in read_rows(str(path))]

    return read


def test_each_row_of_a_json_array_knows_the_line_it_begins_on(read):
    content = '[\n  {\n    "a": 1\n  },\n  {"a": 2}, {"a": 3},\n\n  {"a":\n    4}\n]\n'
    assert read("x.json", content) == [
        ({"a": 1}, "2", ""),
        ({"a": 2}, "5", ""),
        ({"a": 3}, "5", ""),
        ({"a": 4}, "7", ""),
    ]


@pytest.mark.parametrize(
    "content",
    [
        '[\n  {\n    "a": 12345\n  },\n  {"a": "é\\ud83d\\ude00"}, {"b": [1, {"c": null}]},\n\n  {"a":\n   -4e10}\n]\n',
        '  [{"a": 1}, {"a": true, "b": "x]"}, 17, "text", {"a": 2}]   ',
        '{"a": 1}{"a": 2}\n 123 [4] {"a":\n 3}',
        '[\n  {"a": 1},\n  {"a": tru},\n  {"a": "\x01"},\n  {"a": 3},\n',
        '[\n  {"a": 1},\n  {"a": "cut of',
        '[{"a": 1}, {"a": 2                                    ',
        b'[\n {"a": 1},\n {"a": "\xff"},\n {"a": 3}]',
        b'\xef\xbb\xbf[\r\n {"a": 1},\r\n {"a": 2}\r\n]',
    ],
)
def test_a_json_file_is_read_in_pieces_and_no_border_between_them_shows(read, monkeypatch, content):
    whole = read("x.json", content)
    assert len(whole) > 1
    for size in (1, 2, 3, 7, 16):
        monkeypatch.setattr(rows, "_WINDOW", size)
        assert read("x.json", content) == whole


def test_a_broken_row_far_inside_a_single_line_is_refused_with_its_column(read, monkeypatch):
    monkeypatch.setattr(rows, "_WINDOW", 64)
    content = '[{"a": 1}' + ', {"a": 1}' * 1100 + ', {"a": tru}, ' + '{"a": 1}, ' * 100
    with pytest.raises(UserError, match=f"at column {content.index('tru') + 1}:"):
        read("x.json", content)


def test_blank_lines_are_no_rows_and_count_as_lines(read):
    assert read("x.jsonl", '{"a": 1}\n\n  \r\n{"a": 2}\r\n') == [({"a": 1}, "1", ""), ({"a": 2}, "4", "")]
    assert read("x.txt", "one\n\n two \n") == [({"text": "one"}, "1", ""), ({"text": " two "}, "3", "")]


def test_a_line_separator_inside_a_text_ends_no_line(read):
    assert read("x.jsonl", '{"a": "b\u2028c"}\n{"a": 2}') == [({"a": "b\u2028c"}, "1", ""), ({"a": 2}, "2", "")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": "b', "JSON is cut off"),
        (b'{"a": ', "JSON is cut off"),
        (b"{'a': 1}", "is not valid JSON: texts stand in single quotes"),
        (b'{"a": 1} x', "is not valid JSON: a second value stands on its line"),
        (b"\x00\x00\x00", "is not valid JSON: a null byte stands in it"),
        (b'{"a": "\xff"}', "is not UTF-8"),
        (b"[1, 2]", "is a list, not a JSON object"),
        (b'"text"', "is text, not a JSON object"),
        (b'{"a": 1, "a": 2}', "has the same key twice"),
        (b'{"a": ' + b"[" * 100_000, "JSON is nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON"),
    ],
)
def test_a_broken_line_is_counted_with_its_reason_and_the_rows_around_it_are_read(read, line, reason):
    content = b'{"a": 1}\n' + line + b'\n{"a": 2}\n'
    assert read("x.jsonl", content) == [({"a": 1}, "1", ""), (None, "2", reason), ({"a": 2}, "3", "")]


@pytest.mark.parametrize("row", ['{"a": "no end}', '{"a": 1,, "b": 2}', '{"a" 1}', '{"a": {"b": 1}'])
def test_a_broken_row_of_an_array_costs_only_itself(read, row):
    content = '[\n  {"a": 1},\n  ' + row + ',\n  {\n    "a": 3\n  }\n]'
    assert [(value, place) for value, place, _ in read("x.json", content)] == [
        ({"a": 1}, "2"),
        (None, "3"),
        ({"a": 3}, "4"),
    ]


def test_a_json_array_that_is_cut_off_gives_the_rows_before(read):
    assert read("x.json", '[\n{"a": 1},\n{"a": "b') == [({"a": 1}, "2", ""), (None, "3", "JSON is cut off")]
    assert read("x.json", '[{"a": 1},\n') == [({"a": 1}, "1", ""), (None, "2", "JSON is cut off")]


def test_an_array_on_one_line_that_is_broken_in_the_middle_is_refused_with_its_column(read):
    with pytest.raises(UserError, match=r"x\.json:1: is not valid JSON at column 18: a value is missing"):
        read("x.json", '[{"a": 1}, {"a": b}, {"a": 3}]')


@pytest.mark.parametrize("rows", ['{"a": 1}, {"a": b}, {"a": 3}', '{"a": b}, {"a": 3}'])
def test_an_array_is_refused_where_a_broken_row_shares_its_line_with_rows_that_would_be_lost(read, rows):
    with pytest.raises(UserError, match=r"x\.json:1: is not valid JSON at column .*, and no row after it"):
        read("x.json", f'[{rows},\n{{"a": 4}}, {{"a": 5}}]')


def test_what_a_json_file_holds_is_found_out_from_it_not_from_its_name(read):
    assert read("lines.json", '{"a": 1}\n{"a": 2}\n') == [({"a": 1}, "1", ""), ({"a": 2}, "2", "")]
    assert read("objects.json", '{\n"a": 1\n}\n{\n"a": 2\n}') == [({"a": 1}, "1", ""), ({"a": 2}, "4", "")]
    assert read("array.jsonl", ' [{"a": 1},\n{"a": 2}]') == [({"a": 1}, "1", ""), ({"a": 2}, "2", "")]


def test_a_line_that_is_not_utf8_inside_an_array_costs_only_its_row(read):
    rows = read("x.json", b'[{"a": 1},\n{"a": "\xff"},\n{"a": 3}]')
    assert rows == [({"a": 1}, "1", ""), (None, "2", "is not UTF-8"), ({"a": 3}, "3", "")]


@pytest.mark.parametrize(
    ("name", "text"),
    [("x.json", '[{"text": "é"}]'), ("x.jsonl", '{"text": "é"}'), ("x.csv", "text\né\n"), ("x.txt", "é")],
)
def test_a_byte_order_mark_is_no_part_of_the_data(read, name, text):
    assert [row.value for row in read(name, b"\xef\xbb\xbf" + text.encode())] == [{"text": "é"}]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.csv", "x.txt"])
def test_a_file_in_utf16_is_refused_with_the_remedy(read, name):
    with pytest.raises(UserError, match=r"is UTF-16; save it as UTF-8"):
        read(name, '[{"a": 1}]'.encode("utf-16"))


def test_csv_values_stay_the_words_they_are(read):
    rows = read("x.csv", 'instruction,output\nNA,007\n"a, ""b""\nc",1.50\n,true\n')
    assert rows == [
        ({"instruction": "NA", "output": "007"}, "2", ""),
        ({"instruction": 'a, "b"\nc', "output": "1.50"}, "3", ""),
        ({"instruction": "", "output": "true"}, "5", ""),
    ]


def test_a_csv_field_may_be_longer_than_pythons_usual_limit(read):
    assert read("x.csv", "text\n" + "a" * 200_000)[0].value == {"text": "a" * 200_000}


def test_a_csv_row_with_other_fields_than_the_header_is_bad(read):
    rows = read("x.csv", "a,b\n1,2\n1,2,3\n1\n3,4\n")
    assert [row.reason for row in rows] == [
        "",
        "has more fields than the header",
        "has fewer fields than the header",
        "",
    ]


def test_every_line_that_an_open_quote_swallows_is_a_bad_row(read):
    rows = read("x.csv", 'a,b\n1,2\n3,"4\n5,6\n7,8\n')
    assert [(row.place, row.reason) for row in rows[1:]] == [
        (n, "stands in a quote that is never closed") for n in "345"
    ]


def test_every_line_that_a_quote_swallows_before_it_ends_in_the_middle_of_a_field_is_a_bad_row(read):
    rows = read("x.csv", 'a,b\n"1,2\n3,4\n"5"6,7\n8,9\n')
    assert [(row.place, row.reason) for row in rows] == [
        *((n, "stands in a quote that ends in the middle of a field") for n in "234"),
        ("5", ""),
    ]


def test_a_csv_line_with_a_quote_in_a_field_or_another_encoding_costs_only_itself(read):
    rows = read("x.csv", b'a,b\n"1"x,2\n\xff,2\n3,4\n')
    assert [(row.place, row.reason) for row in rows] == [
        ("2", "has a quote in the middle of a field"),
        ("3", "is not UTF-8"),
        ("4", ""),
    ]


ROWS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": ["x"]}], "system": None},
    {"messages": [], "system": "s"},
]


def test_parquet_rows_are_numbered_and_lose_the_keys_that_a_turn_never_had(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert list(read_rows(str(path))) == [Row(ROWS[0], f"{path}:1"), Row(ROWS[1], f"{path}:2")]


@pytest.mark.parametrize("layout", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_arrow_is_read_as_a_file_and_as_a_stream(tmp_path, layout):
    table, path = pyarrow.Table.from_pylist(ROWS), tmp_path / "x.arrow"
    with layout(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    assert list(read_rows(str(path))) == [Row(ROWS[0], f"{path}:1"), Row(ROWS[1], f"{path}:2")]


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_a_columnar_file_that_is_not_whole_is_refused_without_a_traceback(read, name):
    with pytest.raises(UserError, match=r"is not a whole \w+ file"):
        read(name, {"x.parquet": b"PAR1", "x.arrow": b"ARROW1"}[name] + b" but nothing more")


def test_the_rows_of_a_real_array_are_those_that_json_reads(fixture_path):
    path = fixture_path("llamafactory-data") / "data" / "glaive_toolcall_en_demo.json"
    rows, lines = list(read_rows(str(path))), path.read_text(encoding="utf-8").split("\n")
    assert [row.value for row in rows] == json.loads(path.read_text(encoding="utf-8"))
    assert all(lines[int(row.place.rpartition(":")[2]) - 1] == "  {" for row in rows)


def test_empty_files_hold_no_rows(read):
    assert [read(name, "") for name in ("x.json", "x.jsonl", "x.csv", "x.txt")] == [[], [], [], []]
    assert read("x.json", "[]") == []
