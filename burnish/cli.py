"""`burnish COMMAND …`: from the words of a command line to one function, and from its errors to an exit status.

0 done, 1 failed, 2 something that the user gave is wrong (one line each), 130 interrupted. Only `main` reads sys.argv.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from burnish import console, ranks
from burnish.environment import quiet_bitsandbytes
from burnish.errors import Problem, RunStopped, UserError

if TYPE_CHECKING:
    from burnish.arguments.settings import Settings

HELP = """\
burnish tunes open-weight language models and talks with them.

  burnish train CONFIG.yaml     tune a model on your data
  burnish preview CONFIG.yaml   see your data as the model will, token by token
  burnish plan CONFIG.yaml      what it needs: memory, time, and whether it fits
  burnish chat CONFIG.yaml      talk with it, or with any model
  burnish api CONFIG.yaml       serve it as the OpenAI API does
  burnish export CONFIG.yaml    write model and adapters as one whole model
  burnish env                   versions and devices of this machine
  burnish version               which burnish this is

Settings come from a YAML or JSON file, from the command line, or from both; the
command line wins:

  burnish train run.yaml learning_rate=2e-4 --output_dir saves/second
  burnish train --model_name_or_path MODEL --dataset pairs.jsonl --output_dir O

`burnish train --help`, and so for each command, lists every setting. A mistake
is told with its place, its value and what to do, before anything is loaded.
"""

SECONDS_FOR_THE_MAIN = 10


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    return status_of(lambda: _run(words))


def status_of(work: Callable[[], int]) -> int:
    """With which status `work` ends; what stops it is told in a line each."""
    try:
        return work()
    except UserError as error:
        if not ranks.is_local_main():  # which found the same and tells it; its launcher then ends this process too
            time.sleep(SECONDS_FOR_THE_MAIN)
        for problem in error.problems:
            console.fail(str(problem))
        return 2
    except RunStopped as stopped:
        if ranks.is_main():
            console.fail(str(stopped))
        return stopped.status
    except KeyboardInterrupt:
        if ranks.is_main():
            console.fail("interrupted")
        return 130


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0 if words else 2
    command, rest = words[0].removeprefix("--"), words[1:]
    if command not in COMMANDS:
        raise UserError(_no_command(words[0]))
    quiet_bitsandbytes()
    COMMANDS[command](rest)
    return 0


def _no_command(word: str) -> Problem:
    if word.endswith((".yaml", ".yml", ".json")):
        return Problem("burnish", "", word, "is not a command", f"did you mean `burnish train {word}`?")
    near = get_close_matches(word, COMMANDS, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(COMMANDS)}"
    return Problem("burnish", "", word, "is not a command", remedy)


# ---- commands ----------------------------------------------------------------------------------------------------


def train(words: list[str]) -> None:
    if _asks_for_help("train", words):
        return
    settings = _settings("train", words, [wrong_data_sets, wrong_template])
    if not ranks.launched() and (devices := _devices(settings)):
        ranks.launch(["train", *_args_file_beside_the_script(), *words], devices)
    _tell_translated(settings)
    from burnish.workflow import run_train

    run_train(settings)


def _args_file_beside_the_script() -> list[str]:
    """What `src/train.args` says holds for the processes that are started in its place too."""
    from burnish.arguments.command_line import args_file_of_script

    path = args_file_of_script()
    return ["--args_file", path] if path else []


def _devices(settings: Settings) -> int:
    """How many processes a run that was started by itself becomes: 0 where it stays one."""
    if ranks.forced_launch():
        return 1
    if settings.value("use_cpu"):
        return 0
    import torch

    count = torch.cuda.device_count()
    return count if count > 1 else 0


def chat(words: list[str]) -> None:
    if _asks_for_help("chat", words):
        return
    settings = _settings("chat", words, [wrong_template])
    from burnish.workflow import run_chat

    run_chat(settings)


def api(words: list[str]) -> None:
    if _asks_for_help("api", words):
        return
    settings = _settings("api", words, [wrong_template])
    from burnish.workflow import run_api

    run_api(settings)


def export(words: list[str]) -> None:
    if _asks_for_help("export", words):
        return
    settings = _settings("export", words, [wrong_export_dir, wrong_template])
    from burnish.workflow import run_export

    run_export(settings)


PREVIEW_OPTIONS = """\
burnish preview shows rows as the model will see them, token by token, and what
became of all of them. Its exit status is 1 where training would refuse the data.
It needs the tokenizer of the model, not its weights.

options of preview itself:
  --html FILE   write a page as well, for a browser
  --rows N      how many rows are shown: 3 in the terminal, 200 on a page

"""


def preview(words: list[str]) -> None:
    if _asks_for_help("preview", words, PREVIEW_OPTIONS):
        return
    options, rest, mistakes = preview_options(words)
    settings = _settings("preview", rest, [lambda _: mistakes, no_data_set, wrong_data_sets, wrong_template])
    from burnish.workflow import run_preview

    run_preview(settings, page=options.html, rows=options.rows)


@dataclass(frozen=True)
class PreviewOptions:
    html: Path | None = None
    rows: int | None = None


def preview_options(words: Sequence[str]) -> tuple[PreviewOptions, list[str], list[Problem]]:
    """The two options of the command itself, which are no settings of a run; the other words; what is wrong."""
    given: dict[str, str] = {}
    rest: list[str] = []
    waiting = list(words)
    while waiting:
        name, equals, value = waiting.pop(0).partition("=")
        if name not in ("--html", "--rows"):
            rest.append(name + equals + value)
        elif equals or not waiting or waiting[0].startswith("--"):
            given[name] = value
        else:
            given[name] = waiting.pop(0)
    mistakes = []
    html, rows = given.get("--html"), given.get("--rows")
    if rows is not None and not (rows.isdecimal() and int(rows) > 0):
        mistakes.append(Problem("--rows", "", rows, "is not a number of rows", "write --rows 10"))
    if html == "":
        mistakes.append(Problem("--html", "", None, "has no value", "write --html preview.html"))
    page = Path(os.path.expanduser(html)) if html else None
    if page and (page.is_dir() or not page.parent.is_dir()):
        message = "is a folder" if page.is_dir() else "is in a folder that is not there"
        mistakes.append(Problem("--html", "", html, message, "name the file of the page, in a folder that is there"))
    return PreviewOptions(page, int(rows) if rows and not mistakes else None), rest, mistakes


def plan(words: list[str]) -> None:
    from burnish.plan.options import HELP as PLAN_HELP
    from burnish.plan.options import plan_options

    if _asks_for_help("train", words, PLAN_HELP, called="plan"):
        return
    options, rest, mistakes = plan_options(words)
    settings = _settings("train", rest, [lambda _: mistakes, wrong_data_sets, wrong_template])
    if not options.as_json:
        _tell_translated(settings)
    from burnish.workflow import run_plan

    run_plan(settings, options)


def env(words: list[str]) -> None:
    _takes_nothing("env", words)
    from burnish.environment import describe

    for name, value in describe():
        console.say(f"{name:<24}{value}")


def version(words: list[str]) -> None:
    _takes_nothing("version", words)
    from burnish.environment import version_of

    console.say(f"burnish {version_of('burnish') or '(a checkout that is not installed)'}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train, "preview": preview, "plan": plan, "chat": chat, "api": api, "export": export,
    "env": env, "version": version,
}  # fmt: skip


def _settings(command: str, words: list[str], checks: Sequence[Callable[[Settings], list[Problem]]]) -> Settings:
    """The checked settings; what old names and other tools' settings became is printed once.

    `train` prints it itself, when it is known which process trains.
    """
    from burnish.arguments.parse import parse_command

    settings = parse_command(command, words, checks)
    if command != "train":
        _tell_translated(settings)
    return settings


def _tell_translated(settings: Settings) -> None:
    if settings.translated:
        rows = [(old, new or "-", note) for old, new, note in settings.translated]
        console.table(("given", "today", "what happens"), rows)


def _asks_for_help(command: str, words: list[str], before: str = "", called: str = "") -> bool:
    """`called`: the command that was given, where it takes the words of another."""
    if not {"-h", "--help"} & set(words):
        return False
    from burnish.arguments.fields import help_text

    text = help_text(command)
    sys.stdout.write(
        before + (text.replace(f"usage: burnish {command}", f"usage: burnish {called}") if called else text)
    )
    return True


def _takes_nothing(command: str, words: list[str]) -> None:
    if words:
        raise UserError([Problem(f"burnish {command}", "", word, "is not wanted", "leave it out") for word in words])


# ---- checks that need rooms above the floor of arguments -----------------------------------------------------------


def no_data_set(settings: Settings) -> list[Problem]:
    """Preview has nothing to show."""
    if settings.value("dataset") or settings.value("eval_dataset") or settings.is_faulty("dataset", "eval_dataset"):
        return []
    return [settings.missing("dataset", "name one of dataset_info.json, or give a file")]


def wrong_data_sets(settings: Settings) -> list[Problem]:
    """What dataset_info.json says of the data sets that it has; names that it has not are told already."""
    from burnish.data.arguments import unknown_names
    from burnish.data.catalog import problems

    if settings.is_faulty("dataset", "eval_dataset", "dataset_dir"):
        return []
    known = {
        name: [item for item in settings.value(name) or () if item not in unknown_names(settings, name)]
        for name in ("dataset", "eval_dataset")
    }
    return problems(replace(settings.data, **known))


def wrong_export_dir(settings: Settings) -> list[Problem]:
    """A folder that cannot become the model's, told before an hour of merging."""
    from burnish.export.place import unfit

    export_dir = settings.value("export_dir")
    problem = unfit(export_dir) if export_dir else None
    return [settings.problem("export_dir", *problem)] if problem else []


def wrong_template(settings: Settings) -> list[Problem]:
    """A template that is neither one of burnish's nor a file."""
    from burnish.chat.named import named_templates

    template, names = settings.value("template"), named_templates()
    if template is None or template in names or Path(os.path.expanduser(template)).is_file():
        return []
    near = get_close_matches(template, names, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(names)}, or leave it out"
    return [settings.problem("template", "is neither a template of burnish nor a file", remedy)]
