"""What a person sees on the terminal: lines, tables, a progress bar. Only the main process speaks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from burnish import ranks

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def say(message: str = "") -> None:
    """One line on standard output, printed as it is (no markup)."""
    if ranks.is_main():
        out.print(message, markup=False)


def warn(message: str) -> None:
    """One line on standard error for what a person should know but need not act on."""
    if ranks.is_main():
        print(f"note: {message}", file=sys.stderr)  # not through `err`: a progress bar steps aside for sys.stderr only


def fail(message: str) -> None:
    """The last words of a run that could not go on; every rank may say them."""
    red, plain = ("\033[1;31m", "\033[0m") if err.is_terminal and not err.no_color else ("", "")
    print(f"{red}{message}{plain}", file=sys.stderr)  # as in `warn`


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
    if not ranks.is_main():
        return
    grid = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    out.print(grid)
