"""A model made ready for training: loaded, with what is trained marked, on the fastest path that its arithmetic allows.

`load_for_training` for each run; `may_recompute` and `may_record` say what the trainer may do besides. Whatever is not
done says why in one line.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from burnish import console
from burnish.arguments.settings import Settings
from burnish.kernels.fast_path import has_kernels
from burnish.model.attention import choose_kernel
from burnish.model.compile import compile_blocks, why_in_pieces
from burnish.model.cuda_recorder import CudaRecorder
from burnish.model.graphs import has_dropout, pays
from burnish.model.head import unwrap
from burnish.model.loader import compute_dtype, load_model, parameter_table
from burnish.model.patch import enable_gradient_checkpointing, gathered, wants_gradient_checkpointing
from burnish.model.positions import check_positions, rotate_by_document
from burnish.model.probe import ForwardPath, choose_path, try_out
from burnish.model.quantized import is_dequantized
from burnish.model.recompute import Recompute
from burnish.train.distributed import stage_of
from burnish.train.passes import AUTO
from burnish.tuning.adapter import init_adapter
from burnish.tuning.blocks import find_blocks
from burnish.tuning.fuse import fuse_lora, fuse_mlp, fuse_qkv


def load_for_training(settings: Settings, args: Any, tokenizer: Any) -> tuple[Any, ForwardPath]:
    """The model with what is trained marked, and the path its arithmetic allows."""
    dtype = compute_dtype(args.bf16 or settings.finetuning.pure_bf16, args.device, fp16=args.fp16)
    model = load_model(
        settings.model,
        dtype=dtype,
        trainable=True,
        device="cpu" if stage_of(args) == 3 else args.device,  # ZeRO-3 puts every process's part where it belongs
        tokenizer=tokenizer,
        max_length=settings.data.cutoff_len,
    )
    check_positions(model, settings.data.cutoff_len, scaled=settings.model.rope_scaling is not None)
    model = fuse_lora(init_adapter(model, settings.finetuning, settings.model, trainable=True))
    keep_padding = why_padded(settings)
    keep = keep_padding or why_torchs(settings, args)
    why_torch = choose_kernel(unwrap(model).config, args.device, dtype, keep=keep)
    with gathered(model.parameters()):
        path = choose_path(model, keep_padding=keep_padding)
    rotate_by_document(model, settings.data.cutoff_len, padding_free=path.padding_free)
    on, details = wants_gradient_checkpointing(args)
    if on:
        enable_gradient_checkpointing(model, details)
    console.say(f"{parameter_table(model)}; {path}")
    if why_torch and path.padding_free:
        console.say(f"attention is torch's, not cuDNN's: {why_torch}")
    _compile(model, path, args)
    return model, path


def _compile(model: Any, path: ForwardPath, args: Any) -> None:
    """Block by block, where it was asked for, or left open on a GPU."""
    wanted = args.device.type == "cuda" if args.compile_blocks is None else args.compile_blocks
    if not wanted:
        return
    started = time.monotonic()
    if stage_of(args):
        why = "DeepSpeed divides the model"
    elif not path.padding_free:
        why = "padded batches"
    elif is_dequantized(model):
        why = "weights that bitsandbytes holds"
    else:
        if has_kernels(args.device):  # without a GPU's kernels these are no gain
            fuse_mlp(model)
            fuse_qkv(model)
        why = compile_blocks(find_blocks(unwrap(model)).values(), partial(try_out, model))
    if why:
        console.say(f"blocks are not compiled: {why}")
        return
    pieces = why_in_pieces()
    in_pieces = f", in pieces: {pieces}" if pieces else ""
    console.say(f"blocks compiled in {time.monotonic() - started:.0f} s{in_pieces}")


def may_recompute(settings: Settings, args: Any, model: Any) -> Recompute | None:
    """Where `gradient_checkpointing` is left open a GPU's memory decides."""
    left_open = settings.value("gradient_checkpointing") is None and args.device.type == "cuda" and not stage_of(args)
    return Recompute(model, find_blocks(unwrap(model)).values()) if left_open else None


def may_record(settings: Settings, args: Any, model: Any, path: ForwardPath, rows: Any) -> CudaRecorder | None:
    """What records passes, where it was asked for, or left open and pays on a GPU."""
    if args.cuda_graphs is False or not args.do_train:
        return None
    why = _why_not_recorded(settings, args, model, path)
    if not why and (args.cuda_graphs or _recording_pays(settings, args, model, rows)):
        console.say("passes over the blocks are recorded as CUDA graphs")
        return CudaRecorder()
    if args.cuda_graphs:
        console.say(f"passes are not recorded as CUDA graphs: {why}")
    return None


def _why_not_recorded(settings: Settings, args: Any, model: Any, path: ForwardPath) -> str:
    whys = {
        "there is no GPU": args.device.type != "cuda",
        "DeepSpeed divides the model": stage_of(args),
        "padded batches": not path.padding_free,
        "the model's own head and loss": not path.fused_head,
        "it computes in float32": not (args.bf16 or args.fp16),
        "weights that bitsandbytes holds": is_dequantized(model),
        "pure_bf16 rounds gradients at random": settings.finetuning.pure_bf16,
        "blocks are computed again": wants_gradient_checkpointing(args)[0],
        "noise on the embeddings": args.neftune_noise_alpha,
        "dropout": has_dropout(model),
        "full_determinism launches kernels one by one": args.full_determinism,
    }
    return next((why for why, so in whys.items() if so), "")


def _recording_pays(settings: Settings, args: Any, model: Any, rows: Any) -> bool:
    """For about as many tokens as a pass will hold; of a stream, whose lengths nobody knows, at most."""
    packed = settings.data.packing and settings.finetuning.stage == "sft"
    of_a_row = settings.data.cutoff_len if packed or not hasattr(rows, "lengths") else rows.lengths.mean()
    most = AUTO if args.micro_batch_tokens == "auto" else int(args.micro_batch_tokens)
    of_a_step = of_a_row * args.per_device_train_batch_size * args.gradient_accumulation_steps
    return pays(find_blocks(unwrap(model)).values(), min(of_a_step, most))


def why_torchs(settings: Settings, args: Any) -> str:
    """The setting that leaves attention to torch, if one does."""
    if settings.model.flash_attn == "fa2":
        return "flash_attn: fa2 is FlashAttention 2"
    return "full_determinism adds up in one order" if args.full_determinism else ""


def why_padded(settings: Settings) -> str:
    """The setting that asks for padded batches, if one does."""
    if settings.model.flash_attn not in ("auto", "fa2", "fa3"):
        return f"flash_attn: {settings.model.flash_attn} is the model's own attention"
    return "" if settings.data.ignore_pad_token_for_loss else "ignore_pad_token_for_loss: false trains padding"
