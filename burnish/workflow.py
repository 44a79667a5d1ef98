"""One run, read top to bottom: `run_pt`, `run_sft`, `run_chat`. Everything below is handed its parts from here.

The rooms do not know each other: the data room gets a chat template as something that encodes messages, the trainer an
objective and batches, the terminal an engine. This file is where they meet.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, enable_full_determinism, set_seed
from transformers.utils import logging as transformers_logging

from burnish import console, ranks
from burnish.arguments.parse import for_inference
from burnish.arguments.settings import Settings
from burnish.chat.template import ChatTemplate, load_template
from burnish.data.arguments import DataArguments
from burnish.data.hub import Hub
from burnish.data.loader import make_collate
from burnish.data.packing import pack
from burnish.data.preview import About, make_preview, with_first_rows, with_rows_worth_a_look
from burnish.data.preview_data import look
from burnish.data.preview_page import ROWS_ON_PAGE, make_page
from burnish.data.preview_text import ROWS_IN_TERMINAL, preview_lines
from burnish.data.report import first_sample_text
from burnish.data.sources import Datasets, get_dataset
from burnish.data.store import SampleStore
from burnish.data.stream import StreamedSamples
from burnish.environment import quiet_deepspeed
from burnish.errors import Problem, RunStopped, UserError
from burnish.export.run import Order, export_model
from burnish.generate.engine import Engine
from burnish.model.head import CausalLoss, unwrap
from burnish.model.loader import compute_dtype, load_model, num_rows
from burnish.model.positions import warn_of_positions
from burnish.model.probe import ForwardPath
from burnish.model.tokenizer import load_tokenizer
from burnish.plan.devices import DEFAULT, device_here, find_device
from burnish.plan.make import make_plan
from burnish.plan.options import PlanOptions
from burnish.plan.rows import lengths_of
from burnish.plan.run import Run
from burnish.plan.text import plan_as_json, plan_lines
from burnish.prepare import load_for_training, may_recompute, may_record
from burnish.serve.server import open_place, serve
from burnish.serve.terminal import chat_loop
from burnish.train import checkpoint
from burnish.train.card import write_card
from burnish.train.distributed import together
from burnish.train.logs import LogCallback, ProgressCallback, save_metrics
from burnish.train.passes import stop_if_out_of_memory
from burnish.train.peers import Peers
from burnish.train.plot import plot_loss
from burnish.train.start import decide_start
from burnish.train.trainer import Trainer
from burnish.tuning.adapter import init_adapter

Callbacks = Iterable[TrainerCallback | type[TrainerCallback]]


def run_train(settings: Settings, callbacks: Callbacks = ()) -> None:
    """`burnish train`: the run of the settings' stage, alone or as one of several processes."""
    with together(settings), stop_if_out_of_memory("outside the steps"):
        {"pt": run_pt, "sft": run_sft}[settings.finetuning.stage](settings, callbacks)


def run_pt(settings: Settings, callbacks: Callbacks = ()) -> None:
    """Go on pre-training on plain text."""
    args, resume = _begin(settings)
    tokenizer = load_tokenizer(settings.model)
    if settings.data.template:
        console.warn("template is not used in stage pt: a text is learned as it stands")
    datasets = get_dataset(
        settings.data,
        "pt",
        tokenizer,
        None,
        seed=args.seed,
        order_seed=args.data_seed,
        hub=_hub(settings),
        split_special_tokens=settings.model.split_special_tokens,
    )
    _show(datasets, tokenizer, args)
    model, path = load_for_training(settings, args, tokenizer)
    trainer = _make_trainer(settings, args, model, path, tokenizer, datasets, callbacks)
    _run(settings, trainer, resume)


def run_sft(settings: Settings, callbacks: Callbacks = ()) -> None:
    """Learn to answer as the examples do."""
    args, resume = _begin(settings)
    tokenizer = load_tokenizer(settings.model)
    template = _load_template(settings, tokenizer)
    seeds = {"seed": args.seed, "order_seed": args.data_seed}
    datasets = get_dataset(settings.data, "sft", tokenizer, template, **seeds, hub=_hub(settings))
    if settings.data.packing and isinstance(datasets.train, SampleStore):
        datasets.report.packed = pack(datasets.train.lengths, settings.data.cutoff_len)
    _show(datasets, tokenizer, args)
    model, path = load_for_training(settings, args, tokenizer)
    trainer = _make_trainer(settings, args, model, path, tokenizer, datasets, callbacks)
    _run(settings, trainer, resume)


def run_preview(settings: Settings, *, page: Path | None = None, rows: int | None = None) -> None:
    """`burnish preview`: rows as training would see them, and what became of all of them. Loads no weights.

    Raises RunStopped with status 1 where training would refuse the data.
    """
    transformers_logging.disable_progress_bar()
    data, stage = settings.data, settings.finetuning.stage
    tokenizer = load_tokenizer(settings.model)
    template = _load_template(settings, tokenizer) if stage == "sft" else None
    if stage == "pt" and data.template:
        console.warn("template is not used in stage pt: a text is learned as it stands")
    warn_of_positions(settings.model, data.cutoff_len)
    seed = settings.value("seed")
    how = {"hub": _hub(settings), "split_special_tokens": settings.model.split_special_tokens}
    how |= {"seed": seed, "order_seed": settings.value("data_seed")}
    get = partial(get_dataset, stage=stage, tokenizer=tokenizer, template=template, **how)
    looked = look(get, data, rows=rows or 0)
    preview = make_preview(looked, tokenizer, About.of(settings, template.name if template else None))
    first = with_first_rows(preview, looked, tokenizer, rows or ROWS_IN_TERMINAL)
    for line in preview_lines(first, coloured=console.out.color_system is not None and not console.out.no_color):
        console.out.print(line)
    if page:
        whole = with_rows_worth_a_look(preview, looked, tokenizer, rows or ROWS_ON_PAGE, seed)
        page.write_text(make_page(whole), encoding="utf-8", errors="replace")
        console.say(f"\npage: {page}")
    if looked.refused:
        raise RunStopped("\n".join(["training would refuse this data:", *looked.refused]), 1)


def run_plan(settings: Settings, options: PlanOptions) -> None:
    """`burnish plan`: what a run would need, printed. Raises RunStopped with status 1 where it does not fit."""

    def get(data: DataArguments) -> Datasets:
        stage, seeds = settings.finetuning.stage, {"seed": settings.value("seed")}
        tokenizer = load_tokenizer(settings.model)
        template = _load_template(settings, tokenizer) if stage == "sft" else None
        return get_dataset(data, stage, tokenizer, template, **seeds)

    transformers_logging.disable_progress_bar()
    here = None if options.device else device_here()
    device = here or find_device(options.device or DEFAULT)
    ranks = options.devices or (torch.cuda.device_count() if here else 1)
    with redirect_stdout(io.StringIO()):  # what building a model has to say
        plan = make_plan(Run.of(settings, ranks), lengths_of(settings, get), device)
    for line in [json.dumps(plan_as_json(plan), indent=1)] if options.as_json else plan_lines(plan):
        console.say(line)
    if not plan.fits:
        raise RunStopped("the run does not fit", 1)


def run_chat(settings: Settings) -> None:
    """`burnish chat`: talk with a model, or with what a training file's run left."""
    engine = load_engine(settings)
    chat_loop(engine, system=settings.data.default_system, name=_name(settings))


def run_export(settings: Settings) -> None:
    """`burnish export`: base and adapters, or what a training file's run left, as one model in one folder."""
    quiet_deepspeed()
    transformers_logging.disable_progress_bar()
    model_args, notes = for_inference(settings)
    for note in notes:
        console.warn(note)
    if held := [name for name in ("quantization_bit", "base_dtype") if getattr(model_args, name) is not None]:
        console.warn(f"{held[0]} is not used: an adapter is merged into the weights as they were published")
        model_args = replace(model_args, quantization_bit=None, base_dtype=None)
    tokenizer = load_tokenizer(model_args)
    has_template = settings.data.template is not None or tokenizer.chat_template is not None
    template = _load_template(settings, tokenizer) if has_template else None
    on_gpu = settings.model.export_device == "auto" and torch.cuda.is_available()
    export_model(Order(model_args, tokenizer, template, settings.data.cutoff_len, "cuda" if on_gpu else "cpu"))


def run_api(settings: Settings) -> None:
    """`burnish api`: answer as the OpenAI API does, until Ctrl-C."""
    place = open_place(os.environ)
    engine = load_engine(settings)
    serve(
        engine,
        place,
        name=place.address.name or _name(settings),
        template_for=partial(_template, settings, engine.tokenizer),
        split_special_tokens=settings.model.split_special_tokens,
    )


def load_engine(settings: Settings) -> Engine:
    """The tuned (or the named) model, ready to answer, exactly as training saw it: same template, same renderer."""
    transformers_logging.disable_progress_bar()
    model_args, notes = for_inference(settings)
    for note in notes:
        console.warn(note)
    tokenizer = load_tokenizer(model_args)
    template = _load_template(settings, tokenizer)
    device = "cuda" if torch.cuda.is_available() and not settings.value("use_cpu") else "cpu"
    model = load_model(
        model_args,
        dtype=_inference_dtype(settings, device),
        trainable=False,
        device=device,
        tokenizer=tokenizer,
        max_length=settings.data.cutoff_len,
    )
    model = init_adapter(model, settings.finetuning, model_args, trainable=False)
    return Engine(model, tokenizer, template, settings.generating)


def _begin(settings: Settings) -> tuple[Any, Path | None]:
    """Arguments, seeds, and where to begin: (transformers' arguments, the checkpoint to go on from or None)."""
    quiet_deepspeed()
    args = settings.training()
    transformers_logging.set_verbosity(args.get_process_log_level() if args.log_level != "passive" else 40)
    transformers_logging.disable_progress_bar()
    resume = Peers().from_main(lambda: decide_start(settings)) if args.do_train else None
    if args.full_determinism:
        enable_full_determinism(args.seed)
    else:
        set_seed(args.seed)
    return args, resume


def _load_template(settings: Settings, tokenizer: Any) -> ChatTemplate:
    template = _template(settings, tokenizer, settings.data.enable_thinking)
    for note in template.notes:
        console.warn(note)
    tokenizer.chat_template = template.jinja  # so that what is saved is what was trained
    return template


def _template(settings: Settings, tokenizer: Any, enable_thinking: bool | None) -> ChatTemplate:
    return load_template(
        tokenizer,
        settings.data.template,
        default_system=settings.data.default_system,
        enable_thinking=enable_thinking,
        split_special_tokens=settings.model.split_special_tokens,
    )


def _hub(settings: Settings) -> Hub:
    return Hub(settings.model.cache_dir, settings.model.hf_hub_token)


def _show(datasets: Datasets, tokenizer: Any, args: Any) -> None:
    """What was kept, cut and dropped, and the first sample as the model sees it."""
    if datasets.eval and not args.do_eval and args.eval_strategy == "no":
        console.warn("rows are set aside for evaluation, and neither do_eval nor eval_strategy asks for one")
    for line in datasets.report.lines():
        console.say(line)
    first = next(iter(datasets.train or next(iter(datasets.eval.values()), ())), None)
    if first is not None:
        console.say(first_sample_text(first, tokenizer))


def _make_trainer(
    settings: Settings,
    args: Any,
    model: Any,
    path: ForwardPath,
    tokenizer: Any,
    datasets: Datasets,
    callbacks: Callbacks,
) -> Trainer:
    _refuse_ids_without_rows(datasets, num_rows(unwrap(model)), tokenizer)
    tuning = settings.finetuning
    own: list[TrainerCallback] = [LogCallback(args.output_dir), ProgressCallback()]
    if tuning.early_stopping_steps:
        own.append(EarlyStoppingCallback(early_stopping_patience=tuning.early_stopping_steps))
    return Trainer(
        CausalLoss(model, fused=path.fused_head, label_smoothing=args.label_smoothing_factor),
        args,
        collate=make_collate(
            tokenizer,
            padding_free=path.padding_free,
            ignore_pad_token_for_loss=settings.data.ignore_pad_token_for_loss,
            takes_token_type_ids="token_type_ids" in tokenizer.model_input_names,
        ),
        train_dataset=datasets.train,
        pack_to=_row_length(settings, path),
        eval_dataset=datasets.eval if settings.data.eval_on_each_dataset else datasets.eval.get("eval"),
        processing_class=tokenizer,
        callbacks=[*own, *callbacks],
        loraplus_lr_ratio=tuning.loraplus_lr_ratio,
        pure_bf16=tuning.pure_bf16 and any(weight.dtype == torch.bfloat16 for weight in model.parameters()),
        count_correct=tuning.compute_accuracy,
        micro_batch_tokens=args.micro_batch_tokens,
        why_padded="" if path.padding_free else path.reasons[0],
        recompute=may_recompute(settings, args, model),
        recorder=may_record(settings, args, model, path, datasets.train),
        beside_weights=lambda folder: settings.dump(folder / "burnish.yaml"),
    )


def _refuse_ids_without_rows(datasets: Datasets, rows: int, tokenizer: Any) -> None:
    """Some tokenizers have a token that their model has no row for (fit_vocabulary has said so): no text may hold it.

    Raises UserError. A stream is not read for it: nobody knows what is in there.
    """
    if max(tokenizer.get_vocab().values()) < rows:
        return
    for store in (datasets.train, *datasets.eval.values()):
        sample = store.first_beyond(rows) if isinstance(store, SampleStore) else None
        if sample is not None:
            token = tokenizer.convert_ids_to_tokens(int(sample.input_ids.max()))
            message = "is a token that the model has no row for"
            raise UserError(Problem(sample.place, "", token, message, "take it out of the text, or resize_vocab: true"))


def _row_length(settings: Settings, path: ForwardPath) -> int | None:
    """The most tokens of a packed row, where packing is asked for. Raises UserError for a model that cannot have it."""
    if not settings.data.packing or settings.finetuning.stage != "sft":
        return None
    if not path.padding_free:
        message = f"needs samples laid end to end, which this model cannot take ({path.reasons[0]})"
        raise UserError(settings.problem("packing", message, "leave it out; it is trained in padded batches"))
    return settings.data.cutoff_len


def _run(settings: Settings, trainer: Trainer, resume: Path | None) -> None:
    """Train, evaluate, and leave the files that a run leaves."""
    args, folder, peers = trainer.args, trainer.output_dir, trainer.peers
    trained: dict[str, float] = {}
    if args.do_train:
        if resume is None:
            peers.from_main(lambda: checkpoint.clear_run(folder))
        trained = trainer.train(resume).metrics
        if isinstance(trainer.train_dataset, StreamedSamples):
            for line in trainer.train_dataset.known.lines():
                console.say(line)
        trainer.save_model()
        if ranks.is_main():
            trainer.state.save_to_json(str(folder / checkpoint.STATE_FILE))
    if args.do_eval and trainer.eval_dataset is not None:
        save_metrics(folder, "eval", trainer.evaluate_at_end())
    if args.do_train and ranks.is_main():
        pictures = plot_loss(folder, trainer.state.log_history) if settings.finetuning.plot_loss else []
        write_card(folder, settings, trainer.state)
        for line in [f"tuned model: {folder}", *(f"loss plot: {picture}" for picture in pictures)]:
            console.say(line)
        save_metrics(folder, "train", trained)  # last: with it the run counts as finished


def _inference_dtype(settings: Settings, device: str) -> torch.dtype:
    """What the run computed in, so that what was trained is what is asked."""
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    asked = settings.model.infer_dtype
    if asked in named:
        return named[asked]
    of_a_run = settings.value("output_dir") is not None
    fp16, divided = bool(settings.value("fp16")), bool(settings.value("deepspeed"))  # which computes in bf16 for both
    halved = settings.value("bf16") or settings.finetuning.pure_bf16 or (fp16 and divided)
    return compute_dtype(halved or (device == "cuda" and not of_a_run), device, fp16=fp16 and not divided)


def _name(settings: Settings) -> str:
    return Path(settings.value("output_dir") or str(settings.model.model_name_or_path)).name
