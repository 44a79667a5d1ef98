"""export_report.json, and the lines that a person reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from burnish.environment import version_of
from burnish.export.listing import Listing, Written, some
from burnish.export.verify import FROM_DISK, LOST_IS_MUCH, Difference, Proof, dtype_name
from burnish.model.card import public


def write_report(folder: Path, base: str, proof: Proof, listing: Listing, written: Written) -> dict[str, Any]:
    """All figures, into `folder`; paths by their last part, since the folder is made to be published."""
    files = sorted(file for file in folder.glob("*.safetensors"))
    report = {
        "passed": not proof.faults(),
        "faults": proof.faults(),
        "base": public(base),
        "dtype": dtype_name(proof.dtype),
        "tensors": len(listing),
        "parameters": sum(entry.size for entry in listing.values()),
        "files": {file.name: file.stat().st_size for file in files},  # bytes
        "adapters": [
            {
                "name": public(adapter.name),
                "tensors": adapter.tensors,
                "unused_tensors": adapter.unused,
                "effect": asdict(adapter.effect),
                "merged_against_unmerged": asdict(adapter.merged),
            }
            for adapter in proof.adapters
        ],
        "tolerance": proof.tolerance,
        "tolerance_from_disk": FROM_DISK,
        "from_disk_against_written": _figures(proof.from_disk),
        "from_disk_against_base_and_adapters": _figures(proof.from_adapter),
        "from_disk_against_base": _figures(proof.from_base),
        "differs_from_base": proof.differs_from_base,
        "lost_to_rounding": proof.lost,  # share of what the adapters change
        "weights_of_the_base_left_out": written.left_out,
        "grown_by_resize_vocab": written.grown,
        "untied_by_the_adapter": written.untied,
        "versions": {name: version_of(name) for name in ("burnish", "torch", "transformers", "peft", "safetensors")},
    }
    (folder / "export_report.json").write_text(
        json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return report


def _figures(apart: Difference | None) -> dict[str, float] | None:
    return None if apart is None else asdict(apart)


def summary(report: dict[str, Any]) -> Iterator[str]:
    sizes = list(report["files"].values())
    count = "1 file" if len(sizes) == 1 else f"{len(sizes)} files, the largest {_bytes(max(sizes))}"
    yield f"weights: {report['dtype']}, {report['parameters']:,} parameters in {_bytes(sum(sizes))}, {count}"
    for adapter in report["adapters"]:
        unused = len(adapter["unused_tensors"])
        yield f"adapter {adapter['name']}: {adapter['tensors']} tensors, {unused or 'none'} of them unused"
    for what, outcome in checks(report):
        yield f"{what}: {outcome}"


def checks(report: dict[str, Any]) -> list[tuple[str, str]]:
    """What the card and the terminal say of the proof."""
    reference = "base and adapter" if report["adapters"] else "the base"
    apart = report["from_disk_against_base_and_adapters"]
    found = []
    if apart is not None:
        largest = f"largest of one logit {apart['largest']:.2g}"
        found.append((f"logits against {reference}", f"{_share(apart, report['tolerance'])}; {largest}"))
        found.append(("same likeliest token", f"{apart['same_choice']:.1%} of positions"))
    if report["adapters"] and report["from_disk_against_base"] is not None:
        found.append(("logits against the base alone", f"{report['from_disk_against_base']['relative']:.2e} apart"))
    return found


def _share(apart: dict[str, float], tolerance: float) -> str:
    return f"{apart['relative']:.2e} apart (relative; up to {tolerance:.0e} is rounding)"


def notes(report: dict[str, Any]) -> Iterator[str]:
    """What a person should know though nothing is wrong."""
    if report["passed"] and report["differs_from_base"] and report["lost_to_rounding"] > LOST_IS_MUCH:
        yield (
            f"rounding to {report['dtype']} moves the answers by {report['lost_to_rounding']:.0%} of what the adapter "
            "does; infer_dtype: float32 keeps it all"
        )
    if report["weights_of_the_base_left_out"]:
        yield f"weights of the base that are not written: {some(report['weights_of_the_base_left_out'])}"
    if report["grown_by_resize_vocab"]:
        yield f"larger than in the base (resize_vocab): {some(report['grown_by_resize_vocab'])}"
    if report["untied_by_the_adapter"]:
        yield f"embedding and head are two matrices now: {some(report['untied_by_the_adapter'])} is written as well"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
