"""What the scripts that write a page of docs/ share."""

from __future__ import annotations

import sys
from pathlib import Path


def write_or_check(page: Path, text: str) -> int:
    """Write the page; with --check on the command line only say, by the exit status, whether it is as it would be."""
    if "--check" in sys.argv[1:]:
        return int(text != page.read_text(encoding="utf-8"))
    page.write_text(text, encoding="utf-8")
    return 0
