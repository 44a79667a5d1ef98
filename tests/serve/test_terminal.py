"""`chat_loop` as a person meets it, at the far end of a pseudo-terminal, and as a shell script does, through a pipe.

The program under test is a process of its own. Its engine answers a question with the number of messages it was given
and the question's words, one by one; "long" makes it count without end, "huge" does not fit.
"""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAM = """
import fcntl, itertools, os, sys, termios, time
if os.isatty(0):
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C on this terminal is this program's
from burnish.errors import Problem, UserError
from burnish.serve.terminal import chat_loop

WORDS = {"bell": ["\\x1b]0;title\\x07", "b\\x9b2Je"], "think": ["<think>", "hm", "</think>", "yes"]}

class Engine:
    def chat(self, messages):
        question = messages[-1]["content"]
        if question == "huge":
            raise UserError(Problem("prompt", "", None, "has 9,000 tokens", "begin a new conversation"))
        return self.stream(len(messages), question)

    def stream(self, count, question):
        said = ""
        try:
            numbers = itertools.count() if question == "long" else ()
            words = WORDS.get(question, question.split("\\n"))
            for word in itertools.chain([f"[{count}]"], words, numbers):
                said += f" {word}"
                yield f" {word}"
                time.sleep(0.01)
            return {"role": "assistant", "content": said}
        finally:
            print("<closed>", end="", file=sys.stderr, flush=True)

chat_loop(Engine(), system=SYSTEM, name="echo")
print("<left>")
"""


def program(system: str | None = None) -> list[str]:
    return [sys.executable, "-c", PROGRAM.replace("SYSTEM", repr(system))]


class Terminal:
    """The person's side: `type` keys, `expect` what the screen shows from there on."""

    def __init__(self, command: list[str], folder: Path):
        self.keys, child = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "LC_ALL": "C.UTF-8", "INPUTRC": os.devnull}
        root = str(Path(__file__).parents[2])
        self.process = subprocess.Popen(
            command,
            stdin=child,
            stdout=child,
            stderr=child,
            cwd=folder,
            start_new_session=True,
            env=environment | {"PYTHONPATH": root},
        )
        os.close(child)
        self.screen, self.raw = "", ""  # what was not yet expected, and all there ever was, with colours

    def type(self, keys: str) -> None:
        if "\x03" in keys:
            time.sleep(0.3)  # readline shows the prompt a moment before it hears signals; a person is slower than that
        os.write(self.keys, keys.encode())

    def expect(self, pattern: str, seconds: float = 120.0) -> str:
        """Wait for it; what came up to its end is taken off and returned, without colours."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.screen)):
            ready, _, _ = select.select([self.keys], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"{pattern!r} did not come; the screen is {self.screen!r}"
            try:
                more = os.read(self.keys, 4096)
            except OSError:  # how Linux says that the other side is closed
                more = b""
            assert more, f"the program ended without {pattern!r}; the screen is {self.screen!r}"
            self.raw += more.decode(errors="replace")
            self.screen += re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", more.decode(errors="replace"))
        shown, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return shown

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.keys)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal(program(), tmp_path)
    opened.expect(r"Talking with echo\..*\r\n> ")
    yield opened
    opened.close()


def test_a_person_is_answered_and_the_conversation_goes_on(terminal: Terminal):
    terminal.type("hello there\r")
    terminal.expect(r" \[1\] hello there(<closed>)?\r\n(<closed>)?> ")
    terminal.type("again\r")
    terminal.expect(r" \[3\] again")
    terminal.type("/clear\r")
    terminal.expect("forgotten")
    terminal.type("and now\r")
    terminal.expect(r" \[1\] and now")


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal):
    terminal.type("long\r")
    terminal.expect(r" \[1\] long 0 1 2 3")
    terminal.type("\x03")
    terminal.expect("<closed>")
    terminal.expect("> ")
    terminal.type("still here?\r")
    terminal.expect(r" \[3\] still here\?")  # what was said of the answer is part of the conversation
    assert terminal.process.poll() is None


def test_ctrl_c_at_the_prompt_says_how_to_leave_and_twice_leaves(terminal: Terminal):
    terminal.type("half a question\x03")
    terminal.expect("Ctrl-C again, Ctrl-D or /exit leaves\r\n> ")
    terminal.type("a whole one\r")
    terminal.expect(r"\[1\] a whole one.*\r\n.*> ")
    terminal.type("\x03")
    terminal.expect("leaves\r\n> ")
    terminal.type("\x03")
    terminal.expect("<left>")
    assert terminal.process.wait(10) == 0


@pytest.mark.parametrize("keys", ["\x04", "/exit\r"])
def test_ctrl_d_and_exit_leave(terminal: Terminal, keys: str):
    terminal.type(keys)
    terminal.expect("<left>")
    assert terminal.process.wait(10) == 0


def test_a_backslash_goes_on_in_the_next_line(terminal: Terminal):
    terminal.type("one\\\r")
    terminal.type("two\\\r")
    terminal.type("three\r")
    terminal.expect(r" \[1\] one two three")


def test_chinese_is_edited_by_characters_and_found_again_with_arrow_up(terminal: Terminal):
    terminal.type("你好吗\x7f\x7f们\r")
    terminal.expect(r" \[1\] 你们")
    terminal.expect("> ")
    terminal.type("\x1b[A\r")
    terminal.expect(r" \[3\] 你们")


def test_commands_are_told_apart_from_questions(terminal: Terminal):
    terminal.type("/help\r")
    terminal.expect("(?s)/clear .*/system TEXT.*/save FILE.*/exit")
    terminal.type("/nope\r")
    shown = terminal.expect("/nope is no command.*\r\n> ")
    assert "/help" in shown
    terminal.type(" /nope\r")
    terminal.expect(r" \[1\] /nope")


def test_a_system_message_is_set_shown_and_sent(terminal: Terminal):
    terminal.type("/system\r")
    terminal.expect("there is no system message")
    terminal.type("/system Be brief.\r")
    terminal.expect("is set")
    terminal.type("hello\r")
    terminal.expect(r" \[2\] hello")
    terminal.type("/system\r")
    terminal.expect("system message: Be brief.")


def test_a_conversation_is_saved_as_a_data_set_of_one_row(terminal: Terminal, tmp_path: Path):
    terminal.type("/save\r")
    terminal.expect("/save needs the name of a file")
    terminal.type("/system 简短\r你好\r")
    terminal.expect(r" \[2\] 你好")
    terminal.type("/save my chat.json\r")
    terminal.expect("3 messages are in my chat.json")
    [row] = json.loads((tmp_path / "my chat.json").read_text(encoding="utf-8"))
    assert row == {
        "messages": [
            {"role": "system", "content": "简短"},
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": " [2] 你好"},
        ]
    }
    terminal.type("/save nowhere/chat.json\r")
    terminal.expect("nowhere/chat.json is not written: No such file or directory\r\n> ")
    terminal.type("/save ~nobody_here/chat.json\r")
    terminal.expect("~nobody_here/chat.json is not written: .*home directory.*\r\n> ")


def test_a_question_that_does_not_fit_is_told_and_forgotten(terminal: Terminal):
    terminal.type("huge\r")
    terminal.expect("prompt: has 9,000 tokens; begin a new conversation\r\n> ")
    terminal.type("small\r")
    terminal.expect(r" \[1\] small")


def test_an_answer_cannot_command_the_terminal(terminal: Terminal):
    terminal.type("bell\r")
    terminal.expect(r" \[1\] \]0;title b2Je")
    assert "\x1b]0" not in terminal.raw and "\x07" not in terminal.raw and "\x9b" not in terminal.raw


def test_thoughts_are_dimmed(terminal: Terminal):
    terminal.type("think\r")
    terminal.expect("yes")
    assert "\x1b[2m<think> hm </think>\x1b[0m yes" in terminal.raw


# ---- a pipe ------------------------------------------------------------------------------------------------------


def piped(command: list[str], questions: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        command, input=questions, capture_output=True, encoding="utf-8", cwd=folder, env=environment, timeout=60
    )


def test_from_a_pipe_nothing_but_answers_comes_out(tmp_path: Path):
    result = piped(program("Be brief."), "one\n\ntwo \\\nlines\n/nope\n/save chat.json\n你好", tmp_path)
    assert result.stdout == " [2] one\n [4] two  lines\n [6] 你好\n<left>\n"
    assert result.returncode == 0
    assert "/nope is no command" in result.stderr
    assert "5 messages are in chat.json" in result.stderr


def test_from_a_pipe_a_question_that_does_not_fit_ends_the_program(tmp_path: Path):
    result = piped(program(), "one\nhuge\ntwo\n", tmp_path)
    assert result.stdout == " [1] one\n"
    assert "UserError" in result.stderr
    assert result.returncode == 1


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path):
    command = " ".join(["yes hello | head -2000 |", subprocess.list2cmdline([sys.executable]), "talk.py | head -1"])
    (tmp_path / "talk.py").write_text(program()[2].replace("time.sleep(0.01)", "pass"), encoding="utf-8")
    result = piped(["bash", "-o", "pipefail", "-c", f"{command}; echo ${{PIPESTATUS[2]}}"], "", tmp_path)
    assert result.stdout == " [1] hello\n0\n"
    assert "BrokenPipe" not in result.stderr
