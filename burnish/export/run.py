"""`export_model`: base and adapters become one folder, and the folder proves itself before it gets its name.

    1  place      what the base's files hold; a folder beside export_dir
    2  merge      base answers → for each adapter: answers unmerged, merged → dtypes as in the base
    3  write      weights, config, tokenizer, the base's other files
    4  prove      names, shapes, dtypes; the folder loaded again, its answers beside those of 2
    5  finish     report, card, Modelfile; the folder's name

The model is in memory once: what is compared are logits of a few prompts, kept from when each model was there.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from burnish import console
from burnish.chat.template import ChatTemplate
from burnish.errors import RunStopped, UserError
from burnish.export.card import Card, render_card
from burnish.export.files import carry_files, keep_config, set_stop_tokens, write_tokenizer, write_weights
from burnish.export.listing import (
    Listing,
    ModelNames,
    Written,
    compare,
    is_mixed,
    main_dtype,
    names_of,
    read_listing,
)
from burnish.export.merge import cast, merge_exactly, put_on
from burnish.export.modelfile import modelfile
from burnish.export.place import Place, check_login, claim, upload
from burnish.export.report import checks, notes, summary, write_report
from burnish.export.verify import (
    TEXTS,
    AdapterProof,
    Proof,
    Seen,
    answers,
    difference,
    dtype_name,
    make_prompts,
    prove_from_disk,
    tolerance,
)
from burnish.model.arguments import ModelArguments
from burnish.model.loader import load_model, num_rows
from burnish.model.source import find_folder, find_model, first_line, model_problems
from burnish.model.tokenizer import load_tokenizer

GB = 10**9  # bytes, as transformers counts


@dataclass(frozen=True)
class Order:
    """What is to be exported, and how."""

    args: ModelArguments  # the base, the adapters in their order, and export_*
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    max_length: int | None = None  # how far rope_scaling reaches
    device: str = "cpu"
    shard_bytes: int | None = None  # export_size in bytes, if it is not export_size that says it


@dataclass(frozen=True)
class Base:
    """The model that is exported with or without adapters, as its files have it."""

    folder: Path
    listing: Listing
    main: torch.dtype  # of most of its weights
    dtype: torch.dtype  # in which those are written

    @property
    def loads_in(self) -> torch.dtype:
        """Its own dtype, so that it is in memory once; float32 where another one would lose something."""
        return self.main if self.dtype == self.main and not is_mixed(self.listing) else torch.float32

    def dtypes(self, listing: Listing) -> dict[str, torch.dtype]:
        """What each weight is written in: a few may be float32 in a bf16 model, and stay so."""
        return {name: self.dtype if entry.dtype == self.main else entry.dtype for name, entry in listing.items()}


def export_model(order: Order) -> dict[str, Any]:
    """The report. Raises UserError for what cannot begin, RunStopped where the proof finds a fault."""
    args = order.args
    base = _find_base(args)
    if args.export_hub_model_id:
        check_login(args.export_hub_model_id, args.hf_hub_token)
    place = claim(str(args.export_dir), _bytes_needed(base))
    try:
        report = _fill(order, base, place.partial)
    except BaseException as error:
        place.clear()
        if isinstance(error, torch.OutOfMemoryError):
            raise RunStopped("the device has too little memory for this model; set export_device: cpu", 1) from error
        if isinstance(error, OSError | SafetensorError):  # a disk that became full, a share that went away
            raise RunStopped(f"{args.export_dir} could not be written: {first_line(error)}", 1) from error
        raise
    _finish(order, place, report)
    return report


def _find_base(args: ModelArguments) -> Base:
    folder = find_model(args, weights=True)
    if problems := model_problems(folder, args):
        raise UserError(problems)
    listing = read_listing(folder)
    main = main_dtype(listing)
    return Base(folder, listing, main, main if args.infer_dtype == "auto" else getattr(torch, args.infer_dtype))


def _bytes_needed(base: Base) -> int:
    return sum(entry.size for entry in base.listing.values()) * base.dtype.itemsize


def _fill(order: Order, base: Base, folder: Path) -> dict[str, Any]:
    proof = Proof(base.dtype)
    seen, names, prompts = _merge_and_write(order, base, folder, proof)
    gc.collect()  # the model that was written goes before the one that is read
    written = _prove(order, base, folder, proof, seen, names, prompts)
    report = write_report(folder, str(order.args.model_name_or_path), proof, read_listing(folder), written)
    (folder / "README.md").write_text(render_card(_card(order, base, report)), encoding="utf-8")
    (folder / "Modelfile").write_text(modelfile(order.template, order.tokenizer), encoding="utf-8")
    return report


def _merge_and_write(order: Order, base: Base, folder: Path, proof: Proof) -> tuple[Seen, ModelNames, list[list[int]]]:
    args = order.args
    model = load_model(
        args,
        dtype=base.loads_in,
        trainable=True,  # leaves `use_cache` as it was published
        device=order.device,
        tokenizer=order.tokenizer,
        max_length=order.max_length,
    )
    prompts = make_prompts(order.tokenizer, order.template, num_rows(model))
    alone = now = answers(model, prompts)
    for name in args.adapter_name_or_path or ():
        model, now = _merge_one(model, name, args, prompts, now, base.loads_in, proof)
    names = names_of(model, may_grow=args.resize_vocab)
    cast(model, base.dtypes(names.today(base.listing, names.names)), base.dtype)
    carry_files(base.folder, folder, args)
    set_stop_tokens(model, order.template.stop_ids if order.template else [])
    most = order.shard_bytes or args.export_size * GB
    write_weights(model, folder, most, own_names=names.are_those_of(base.listing))
    keep_config(base.folder, folder, args, base.dtype)
    write_tokenizer(base.folder, folder, order.tokenizer, order.template, args)
    return Seen(alone, now, answers(model, prompts)), names, prompts


def _merge_one(
    model: PreTrainedModel,
    name: str,
    args: ModelArguments,
    prompts: list[list[int]],
    before: Tensor,
    dtype: torch.dtype,
    proof: Proof,
) -> tuple[PreTrainedModel, Tensor]:
    """The model with one adapter more in its weights, and the answers it gave while that was beside them."""
    tuned, tensors, unused = put_on(model, name, args)
    beside = answers(tuned, prompts)
    model = merge_exactly(tuned, name)
    merged = difference(answers(model, prompts), beside)
    proof.adapters.append(
        AdapterProof(name, tensors, unused, difference(beside, before), merged, allowed=tolerance(dtype))
    )
    return model, beside


def _prove(
    order: Order, base: Base, folder: Path, proof: Proof, seen: Seen, names: ModelNames, prompts: list[list[int]]
) -> Written:
    listing = read_listing(folder)
    meant = names.today(base.listing, listing)
    written = compare(meant, listing, names, base.dtypes(meant))
    proof.in_files += written.faults
    args = replace(
        order.args,
        model_name_or_path=str(folder),
        adapter_name_or_path=None,
        rope_scaling=None,  # it is in the config now
        resize_vocab=False,
    )
    proof.in_files += _tokenizer_faults(order, args)
    dtype = torch.float32 if is_mixed(base.listing) else base.dtype
    prove_from_disk(proof, load_model(args, dtype=dtype, trainable=True, device=order.device), prompts, seen)
    return written


def _tokenizer_faults(order: Order, args: ModelArguments) -> list[str]:
    """Whether the folder's tokenizer makes the same ids, and has the chat template."""
    now, was, template = load_tokenizer(args), order.tokenizer, order.template
    texts = [*TEXTS, *([template.prompt_text([{"role": "user", "content": TEXTS[0]}])] if template else [])]
    found = []
    if len(now) != len(was) or any(now.encode(text) != was.encode(text) for text in texts):
        found.append("the tokenizer that was written does not make the same ids")
    if template is not None and now.chat_template != template.jinja:
        found.append("the chat template that was written is not the one of this run")
    return found


def _card(order: Order, base: Base, report: dict[str, Any]) -> Card:
    args, adapters = order.args, order.args.adapter_name_or_path or []
    return Card(
        name=Path(os.path.expanduser(str(args.export_dir))).absolute().name,
        base=str(args.model_name_or_path),
        adapters=adapters,
        dtype=dtype_name(base.dtype),
        checks=checks(report),
        base_folder=base.folder,
        run_folder=find_folder(adapters[-1], args, revision=None, weights=False) if adapters else base.folder,
        has_template=order.template is not None,
    )


def _finish(order: Order, place: Place, report: dict[str, Any]) -> None:
    """The folder's name comes first: whoever reads our lines may have gone."""
    if report["faults"]:
        place.give_up()
    else:
        place.give_name()
    for line in summary(report):
        console.say(line)
    for note in notes(report):
        console.warn(note)
    if report["faults"]:
        faults = "; ".join(report["faults"])
        raise RunStopped(f"not exported: {faults}. What was written is in {place.failed}", 1)
    console.say(f"exported model: {place.final}")
    if order.args.export_hub_model_id:
        address = upload(place.final, order.args.export_hub_model_id, order.args.hf_hub_token)
        console.say(f"uploaded: {address}")
