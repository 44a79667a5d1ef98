"""FinetuningArguments: the stage, and which weights move. The names are LLaMA-Factory's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from burnish.arguments.settings import Settings
    from burnish.errors import Problem


@dataclass
class FinetuningArguments:
    """What is learned, and which weights learn it."""

    stage: Literal["pt", "sft"] = field(
        default="sft", metadata={"help": "pt goes on pre-training on plain text, sft learns to answer."}
    )
    finetuning_type: Literal["full", "freeze", "lora"] = field(
        default="lora", metadata={"help": "full trains every weight, freeze some layers, lora small matrices beside."}
    )
    freeze_trainable_layers: int = field(
        default=2, metadata={"help": "freeze: how many layers are trained; n > 0 the last n, n < 0 the first."}
    )
    freeze_trainable_modules: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={"help": "freeze: names of modules inside these layers, separated by commas; all is every one."},
    )
    freeze_extra_modules: list[str] | None = field(
        default=None,
        metadata={"help": "freeze: names of modules outside the layers to train too (embed_tokens, norm)."},
    )
    lora_rank: int = field(default=8, metadata={"help": "lora: inner dimension of the two small matrices."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "lora: scale of what they add, over the rank; twice the rank when not given."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "lora: dropout before the small matrices."})
    lora_target: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={"help": "lora: names of modules that get them, separated by commas; all is every linear layer."},
    )
    additional_target: list[str] | None = field(
        default=None,
        metadata={"help": "lora: modules trained whole and saved with the adapter (embed_tokens, lm_head)."},
    )
    use_rslora: bool = field(default=False, metadata={"help": "lora: scale by the root of the rank (rank-stabilized)."})
    use_dora: bool = field(default=False, metadata={"help": "lora: learn magnitude and direction apart (DoRA)."})
    pissa_init: bool = field(default=False, metadata={"help": "lora: begin at the principal components (PiSSA)."})
    loraplus_lr_ratio: float | None = field(
        default=None, metadata={"help": "lora: learning rate of B over that of A (LoRA+)."}
    )
    create_new_adapter: bool = field(
        default=False, metadata={"help": "lora: merge the given adapters and train a new one, not the last of them."}
    )
    pure_bf16: bool = field(
        default=False,
        metadata={"help": "Keep trained weights and optimizer in bf16 alone, rounded at random; means bf16 compute."},
    )
    plot_loss: bool = field(default=False, metadata={"help": "Save the curves of the loss as pictures."})
    compute_accuracy: bool = field(default=False, metadata={"help": "Evaluation also counts tokens guessed right."})
    early_stopping_steps: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a better metric_for_best_model."}
    )

    def __post_init__(self) -> None:
        self.lora_alpha = self.lora_alpha or 2 * self.lora_rank


NOTHING_TO_CHANGE: dict[str, str] = {}

DO_NOT_TRAIN = {"plot_loss", "compute_accuracy"}

ONLY_LORA = (
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "use_rslora", "use_dora"),
    *("pissa_init", "loraplus_lr_ratio", "create_new_adapter"),
)
ONLY_FREEZE = ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules")


def problems(settings: Settings) -> list[Problem]:
    found = settings.out_of_range(
        lora_rank=(lambda v: v >= 1, "is not a rank", "give 8, 16 …"),
        lora_alpha=(lambda v: v > 0, "is not above 0", "twice the rank is usual"),
        lora_dropout=(lambda v: 0 <= v < 1, "is not in [0, 1)", "0 or 0.05 is usual"),
        loraplus_lr_ratio=(lambda v: v > 0, "is not above 0", "16 is usual"),
        early_stopping_steps=(lambda v: v >= 1, "is not at least 1", "give a number of evaluations"),
    )
    if not settings.is_faulty("finetuning_type"):
        found += _of_another_method(settings)
    if settings.value("freeze_trainable_layers") == 0 and not settings.value("freeze_extra_modules"):
        remedy = "2 is the last two, -2 the first two; or name freeze_extra_modules"
        found.append(settings.problem("freeze_trainable_layers", "trains no layer", remedy))
    if settings.value("use_dora") and settings.value("pissa_init"):
        found.append(settings.problem("use_dora", "and pissa_init exclude each other", "leave one of them out"))
    return found


def _of_another_method(settings: Settings) -> list[Problem]:
    """`lora_rank` in a freeze run would do nothing: say so."""
    method = settings.value("finetuning_type")
    others = {"lora": ONLY_FREEZE, "freeze": ONLY_LORA, "full": (*ONLY_FREEZE, *ONLY_LORA)}[method]
    found = [
        settings.problem(
            name,
            f"does nothing with finetuning_type: {method}",
            f"leave it out, or set finetuning_type: {'lora' if name in ONLY_LORA else 'freeze'}",
        )
        for name in others
        if settings.differs_from_default(name)
    ]
    if method != "lora" and settings.value("adapter_name_or_path"):
        found.append(
            settings.problem("adapter_name_or_path", f"does nothing with finetuning_type: {method}", "set it to lora")
        )
    return found
