"""`burnish chat`: a conversation in the terminal.

A question a line, the answer as it is made. Between two terminals there is a prompt, line editing and a few commands
that begin with a slash; from a pipe a question a line goes in and nothing but the answers comes out.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Protocol

from burnish import console
from burnish.errors import UserError
from burnish.types import Message

HELP = """\
/clear          forget the conversation; the system message stays
/system TEXT    set the system message; without TEXT show it
/save FILE      write the conversation as JSON, a data set of one row in the openai format
/help           this list
/exit           leave (Ctrl-D too)
Ctrl-C stops an answer. A backslash at the end of a line goes on in the next one."""

HOW_TO_LEAVE = "Ctrl-C again, Ctrl-D or /exit leaves"
# What a model may not send to a terminal: it could move the cursor, rename the window, hide what follows
CONTROL = dict.fromkeys([*range(0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0)])


class Answers(Protocol):
    """What a conversation needs of `generate/engine.py: Engine`."""

    def chat(self, messages: list[Message]) -> Generator[str, None, Message]: ...


def chat_loop(engine: Answers, *, system: str | None = None, name: str = "the model") -> None:
    """Talk until the end of the input or /exit.

    Raises, from a pipe only, UserError for a conversation that does not fit, and KeyboardInterrupt for Ctrl-C.
    """
    _Conversation(engine, system, name).run()


class _Conversation:
    def __init__(self, engine: Answers, system: str | None, name: str):
        self.engine = engine
        self.name = name
        self.system = system
        self.turns: list[Message] = []
        self.is_live = sys.stdin.isatty() and sys.stdout.isatty()  # a person at both ends
        has_styles = self.is_live and os.environ.get("TERM", "dumb") != "dumb"
        self.dim, self.plain = ("\033[2m", "\033[0m") if has_styles else ("", "")

    @property
    def messages(self) -> list[Message]:
        system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.turns

    def run(self) -> None:
        _forgive_encoding()
        if self.is_live:
            with suppress(ImportError):  # from here on `input` edits lines by characters and remembers them
                import readline  # noqa: F401
            console.say(f"Talking with {self.name}. /help lists the commands, Ctrl-D leaves.")
        try:
            while self._turn():
                pass
        except BrokenPipeError:  # the reader of our answers has gone, as `head` does; nobody is left to tell
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _turn(self) -> bool:
        """One line in and what it calls for; False when it was the last."""
        try:
            question = self._read()
            if question is None or question.split() == ["/exit"]:
                return False
            if question.startswith("/"):
                self._command(question)
            elif question.strip():
                self._ask(question.strip())
        except KeyboardInterrupt:  # at a moment when there was nothing to stop
            if not self.is_live:
                raise
        return True

    # 1. A question

    def _read(self) -> str | None:
        """The next question, lines that end in a backslash joined; None when there is none to come."""
        interrupted = False
        while True:
            lines: list[str] = []
            try:
                while not lines or lines[-1].endswith("\\"):
                    lines = [line.removesuffix("\\") for line in lines]
                    lines.append(self._line("  " if lines else "> "))
                return "\n".join(lines)
            except EOFError:
                if self.is_live:
                    print()
                return "\n".join(lines) if lines else None
            except KeyboardInterrupt:
                if not self.is_live:
                    raise
                print()
                if interrupted:
                    return None
                interrupted = True
                self._tell(HOW_TO_LEAVE)

    def _line(self, prompt: str) -> str:
        if self.is_live:
            return input(prompt)
        if line := sys.stdin.readline():
            return line.rstrip("\r\n")
        raise EOFError

    # 2. Its answer

    def _ask(self, question: str) -> None:
        """Show the answer as it comes. What Ctrl-C cut short stays in the conversation as far as it came."""
        self.turns.append({"role": "user", "content": question})
        shown: list[str] = []
        try:
            answer = self._stream(shown)
        except UserError as error:
            self.turns.pop()
            if not self.is_live:
                raise
            self._tell(str(error))
            return
        except KeyboardInterrupt:
            if not self.is_live:
                raise
            print(self.plain)
            answer: Message = {"role": "assistant", "content": "".join(shown)}
        if answer == {"role": "assistant", "content": ""}:  # nothing was said: as if nothing had been asked
            self.turns.pop()
        else:
            self.turns.append(answer)

    def _stream(self, shown: list[str]) -> Message:
        with closing(self.engine.chat(self.messages)) as pieces:
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as end:
                    print(self.plain, flush=True)
                    return end.value
                shown.append(piece)
                print(self._for_terminal(piece) if self.is_live else piece, end="", flush=True)

    def _for_terminal(self, piece: str) -> str:
        """Without control characters, and with the thoughts of a thinking model dimmed."""
        piece = piece.translate(CONTROL)
        return piece.replace("<think>", f"{self.dim}<think>").replace("</think>", f"</think>{self.plain}")

    # 3. The commands

    def _command(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        match command:
            case "/help":
                self._tell(HELP)
            case "/clear":
                self.turns.clear()
                self._tell("the conversation is forgotten")
            case "/system" if rest:
                self.system = rest
                self._tell("the system message is set; /clear forgets what was said before it")
            case "/system":
                self._tell(f"system message: {self.system}" if self.system else "there is no system message")
            case "/save":
                self._save(rest)
            case _:
                self._tell(f"{command} is no command; /help lists them, and a space before the slash asks it as it is")

    def _save(self, path: str) -> None:
        if not path:
            return self._tell("/save needs the name of a file")
        rows: list[dict[str, Any]] = [{"messages": self.messages}]
        try:
            Path(path).expanduser().write_text(json.dumps(rows, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        except (OSError, RuntimeError) as error:  # RuntimeError: ~ and the name of nobody
            return self._tell(f"{path} is not written: {getattr(error, 'strerror', None) or error}")
        return self._tell(f"{len(self.messages)} messages are in {path}")

    def _tell(self, text: str) -> None:
        """A word from the program itself: on standard output to a person, aside where answers go into a pipe."""
        print(f"{self.dim}{text}{self.plain}", file=sys.stdout if self.is_live else sys.stderr)


def _forgive_encoding() -> None:
    """A byte that is no text in the terminal's encoding becomes a question mark instead of the end of the program."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
