"""A `Preview` as one page for a browser: preview_page.html with the values in it as JSON. It loads nothing else.

One idea: the page is an empty form that its own script fills from one block of data, so text from a data set is only
ever text: nothing of it is HTML, and `<` is written as an escape, so that no row can end the block.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from burnish.data.preview import PartView, Preview
from burnish.data.preview_rows import Run, ShownRow

ROWS_ON_PAGE = 200
TEMPLATE = Path(__file__).with_name("preview_page.html")


def make_page(preview: Preview) -> str:
    title = f"{', '.join(preview.about.datasets)} · burnish preview"
    data = json.dumps(page_data(preview), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", escape(title), 1).replace("{{data}}", data, 1)


def page_data(preview: Preview) -> dict[str, Any]:
    """What the page's script reads."""
    return {
        "about": asdict(preview.about),
        "units": preview.units,
        "rows": preview.rows,
        "kept": preview.kept,
        "duplicates": preview.duplicates,
        "straddled": preview.straddled,
        "streamed": preview.streamed,
        "notes": preview.notes,
        "refused": preview.refused,
        "reasons": [asdict(reason) | {"tag": reason.tag} for reason in preview.reasons],
        "parts": [_part(part) for part in preview.parts],
        "shown": [_row(row) for row in preview.shown],
    }


def _part(part: PartView) -> dict[str, Any]:
    values = asdict(part)
    for found in (values["repeated"], values["shared"]):
        if found:
            found["rows"] = len(found["rows"])  # how many the places are of
    return values


def _row(row: ShownRow) -> dict[str, Any]:
    return {
        "part": row.part,
        "index": row.index,
        "place": row.place,
        "tags": row.tags,
        "runs": [_run(run) for run in row.runs],
    }


def _run(run: Run) -> dict[str, Any]:
    """Short keys: there are many."""
    return {"t": run.texts, "i": run.ids, "y": int(run.trained), "d": int(run.begins_document)}
