"""A `Preview` as lines for a terminal: tokens in two alternating shades, the trained ones green; then the report.

Without colours (a pipe, NO_COLOR) a bar stands between tokens and what is trained stands in ‹ ›:

    <|im_start|>│user│⏎ …  <|im_start|>│assistant│⏎‹Hello│.│<|im_end|>›

Long rows are folded: of each long stretch of trained or untrained tokens only its two ends are shown.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import pairwise

from rich.text import Text

from burnish.data.preview import About, Histogram, PartView, Preview
from burnish.data.preview_rows import Run, ShownRow
from burnish.data.report import printable

ROWS_IN_TERMINAL = 3
HEAD, TAIL = 60, 30  # tokens that are shown of a stretch
MOST_RUNS = 24  # stretches that are shown of a row
_BAR = 40  # characters of the longest bar
_MOST_BARS = 12
_STYLES = {True: ("black on green", "black on bright_green"), False: ("", "dim")}
_PLACES = 3  # examples of equal rows
_SHOWN_AS = {"\n": "⏎\n", "\t": "⇥", "\r": "␍"}
_JOINERS = "\u200c\u200d"  # invisible, but part of words and of emoji


def preview_lines(preview: Preview, *, coloured: bool) -> Iterator[Text]:
    for row in preview.shown:
        yield from _row(row, preview, coloured)
        yield Text()
    if preview.shown:
        legend = "green: trained" if coloured else "‹ ›: trained; │: border of two tokens"
        yield Text(f"{legend}; ⏎: a line break in the text", style="dim")
        yield Text()
    yield from (Text(printable(line)) for line in _report(preview))


# ---- rows --------------------------------------------------------------------------------------------------------


def _row(row: ShownRow, preview: Preview, coloured: bool) -> Iterator[Text]:
    of = next((part.samples for part in preview.parts if part.name == row.part), 0)
    documents = 1 + sum(run.begins_document for run in row.runs)
    several = f", {documents} documents" if documents > 1 else ""
    number = f"{row.part} {row.index + 1:,}" + (f" of {of:,}" if preview.streamed is None else "")
    share = row.num_trained / row.num_tokens
    facts = f"{row.num_tokens:,} tokens, {row.num_trained:,} trained ({share:.0%}){several}"
    yield Text.assemble((f"── {number} ", "bold"), (printable(row.place), "bold cyan"), (f" ── {facts}", "bold"))
    line, shade = Text(), 0
    for at, run in enumerate(row.runs):
        if at == MOST_RUNS:
            left = sum(len(run.ids) for run in row.runs[at:])
            line.append(f" … {left:,} more tokens", "dim italic")
            break
        if run.begins_document:
            line.append("\n" if coloured or line.plain else "")
            line.append("╌╌ another document ╌╌\n", "magenta")
        elif at and not coloured and not run.trained and not row.runs[at - 1].trained:
            line.append("│")
        shade = _append(line, run, coloured, shade)
    line.rstrip()
    yield line


def _append(line: Text, run: Run, coloured: bool, shade: int) -> int:
    """One stretch, folded where it is long; → the shade of the next token."""
    folded = len(run.ids) > HEAD + TAIL + 10
    kept = range(len(run.ids))
    at = [*kept[:HEAD], *kept[-TAIL:]] if folded else list(kept)
    if run.trained and not coloured:
        line.append("‹")
    for position, index in enumerate(at):
        if folded and position == HEAD:
            line.append(f" … {len(run.ids) - HEAD - TAIL:,} tokens … ", "dim italic")
        text = run.texts[index]
        if text is None:  # its character is shown already
            continue
        if not coloured and position and position != HEAD * folded:
            line.append("│")
        line.append(visible(text), _STYLES[run.trained][shade] if coloured else "")
        shade = 1 - shade
    if run.trained and not coloured:
        line.append("›")
    return shade


def visible(text: str) -> str:
    """A text whose line breaks, tabs and control characters can be seen, and do nothing to a terminal."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character in _SHOWN_AS:
        return _SHOWN_AS[character]
    if character in _JOINERS or unicodedata.category(character)[0] != "C":
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f"[U+{code:04X}]"


# ---- report ------------------------------------------------------------------------------------------------------


def _report(preview: Preview) -> Iterator[str]:
    about = preview.about
    how = f", template {about.template}" if about.template else ""
    yield f"{', '.join(about.datasets)}: stage {about.stage}{how}, cutoff_len {about.cutoff_len:,}"
    if preview.streamed is not None:
        yield f"streaming: only the first {preview.streamed:,} samples of train were looked at; all figures are of them"
    if preview.rows:
        yield f"rows: {preview.rows:,} read, {preview.kept:,} of them used"
    for reason in preview.reasons:
        heading = "bad row" if reason.kind == "bad" else reason.kind
        yield f"  {heading}: {reason.text}: {reason.count:,} (first: {reason.first})"
        if reason.excerpt:
            yield f"    {visible(reason.excerpt)[:100]}"
    if preview.duplicates:
        yield f"  duplicates: {preview.duplicates:,} of the rows in files are equal to an earlier one"
    if preview.straddled:
        yield f"  borders: an answer began or ended inside a token, cut in two there, {preview.straddled:,} times"
    yield from (f"  {note}" for note in preview.notes)
    for part in preview.parts:
        yield ""
        yield from _part(part, preview)


def _part(part: PartView, preview: Preview) -> Iterator[str]:
    about, units, lengths = preview.about, preview.units, part.lengths
    if not lengths:
        yield f"{part.name}: no sample"
        return
    share = f"{part.trained:,} of them trained ({part.trained / part.tokens:.0%})"
    yield f"{part.name}: {part.samples:,} samples, {part.tokens:,} tokens, {share}"
    spread = f"{lengths.shortest:,} to {lengths.longest:,}, median {lengths.median:,}, mean {lengths.mean:,.1f}"
    before = " before cutoff_len" if lengths.before_cutoff else ""
    yield f"  length of {units}{before}, in tokens: {spread}"
    if part is preview.parts[0]:
        yield from _bars(lengths.histogram)
    if part is preview.parts[0] and part.shares:
        yield "  share of a sample that is trained, in percent:"
        yield from _bars(part.shares)
    if part.cutoff and preview.streamed is None:
        yield f"  cutoff_len {part.cutoff:,} keeps 99 % of the {units} whole"
    if part.fill and part.name == "train":
        rows = f"{part.fill.rows:,} {'row' if part.fill.rows == 1 else 'rows'} of {about.cutoff_len:,} tokens"
        yield f"  {_is_packed(about)} {rows}, {part.fill.share:.1%} full"
    repeated, shared = part.repeated, part.shared
    if repeated.count:
        yield f"  equal to an earlier one, token by token: {repeated.count:,} of {repeated.of:,} {units}"
        yield from _places(repeated.places)
    if shared:
        yield f"  in train too: {f'{shared.count:,}' if shared.count else 'none'} of {shared.of:,} {units}"
        yield from _places(shared.places)


def _is_packed(about: About) -> str:
    if about.stage == "pt":
        return "joined into"
    return "packed into" if about.packing else "packing: true would make"


def _places(places: tuple[tuple[str, str], ...]) -> Iterator[str]:
    yield from (f"    {later} = {earlier}" for later, earlier in places[:_PLACES])
    if len(places) > _PLACES:
        yield "    …"


def _bars(histogram: Histogram) -> Iterator[str]:
    edges, counts = _fewer(histogram)
    while counts[-1] == 0:
        edges, counts = edges[:-1], counts[:-1]
    while counts[0] == 0:
        edges, counts = edges[1:], counts[1:]
    ranges = [_range(start, end) for start, end in pairwise(edges)]
    width = max(map(len, ranges))
    for label, count in zip(ranges, counts, strict=True):
        bar = "█" * round(_BAR * count / max(counts)) or ("▏" if count else "")
        yield f"    {label:>{width}}  {bar} {count:,}"


def _fewer(histogram: Histogram) -> tuple[list[int], list[int]]:
    """Two bins become one where there are many: a terminal is low."""
    edges, counts = list(histogram.edges), list(histogram.counts)
    if len(counts) <= _MOST_BARS:
        return edges, counts
    return [*edges[:-1:2], edges[-1]], [sum(counts[at : at + 2]) for at in range(0, len(counts), 2)]


def _range(start: int, end: int) -> str:
    return f"{start:,}" if end == start + 1 else f"{start:,}–{end - 1:,}"
