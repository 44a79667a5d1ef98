"""Files of parquet and arrow → their rows as Python holds them; for a row that it cannot hold, the reason.

    {"messages": [{"role": "user", "content": "hi", "tool_calls": null}]}   →  {"messages": [{"role": …, "content": …}]}
    {"text": b"\\xff" (said to be a string)}                                →  "text is not UTF-8"

pyarrow is imported when the first such file is read. Which row stands where is rows.py's to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from burnish.data.broken import NOT_UTF8, UNREADABLE
from burnish.errors import Problem, UserError


def parquet_rows(path: str) -> Iterator[dict[str, Any] | str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            yield from _rows_of(file.iter_batches(batch_size=1024), path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(_not_arrow(path, "parquet", error)) from error


def arrow_rows(path: str) -> Iterator[dict[str, Any] | str]:
    """Both of Arrow's layouts: files (with a footer) and streams (what `datasets` saves)."""
    import pyarrow

    try:
        with pyarrow.memory_map(path) as source:
            try:
                reader = pyarrow.ipc.open_file(source)
            except pyarrow.ArrowInvalid:
                source.seek(0)
                yield from _rows_of(pyarrow.ipc.open_stream(source), path)
                return
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            yield from _rows_of(batches, path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(_not_arrow(path, "arrow", error)) from error


def _not_arrow(path: str, kind: str, error: Exception) -> Problem:
    reason = str(error).splitlines()[0].rstrip(".")
    return Problem(path, "", None, f"is not a whole {kind} file: {reason}", "download or write it again")


def _rows_of(batches: Any, path: str) -> Iterator[dict[str, Any] | str]:
    for batch in batches:
        names = batch.schema.names
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(Problem(path, "", twice, "names two columns", "rename one of them"))
        for value in _rows_of_batch(batch):
            yield value if isinstance(value, str) else without_nulls(value)


def _rows_of_batch(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Each row; or, where Python cannot hold a value (text that is not UTF-8, the year 200 000), the reason."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError, LookupError):
        for index in range(len(batch)):
            yield _row_by_columns(batch.slice(index, 1))
    else:
        yield from rows


def _row_by_columns(row: Any) -> dict[str, Any] | str:
    values: dict[str, Any] = {}
    for name in row.schema.names:
        try:
            values[name] = row.column(name)[0].as_py()
        except UnicodeDecodeError:
            return f"{name} {NOT_UTF8}"
        except (ValueError, OverflowError, LookupError):
            return f"{name} {UNREADABLE}"
    return values


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A columnar file gives every object inside a row all the keys of its column; those it did not have come as None.
    Its maps come as lists of pairs.

    >>> without_nulls({"input": None, "messages": [{"role": "user", "content": "hi", "tool_calls": None}]})
    {'input': None, 'messages': [{'role': 'user', 'content': 'hi'}]}
    """

    def tidy(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: tidy(item) for key, item in value.items() if item is not None}
        if not isinstance(value, list):
            return value
        if value and all(isinstance(pair, tuple) and isinstance(pair[0], str) for pair in value):
            return tidy(dict(value))
        return [tidy(item) for item in value]

    return {column: tidy(value) for column, value in row.items()}
