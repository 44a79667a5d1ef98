"""The one renderer: training, evaluation, chat, the API and export all read conversations through it.

A `ChatTemplate` is a tokenizer and a jinja template. `prompt` gives the ids that are sent to a model, `encode` the ids
that it is trained on, which begin with those of the prompt; `parse` makes a message of the ids it answers with.
Which template: the tokenizer's own, one of burnish by name (named.py), or a jinja file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from burnish.chat.draft import Draft, draft_samples, with_prompts
from burnish.chat.ending import find_ending, find_lead
from burnish.chat.named import fitting_names, get_template, named_templates, tokenizer_place
from burnish.chat.pieces import Rendered, TextEncoder, is_one_token
from burnish.chat.render import CannotRender, Chat, Renderer, Tools
from burnish.chat.tools import FORMATS, no_calls
from burnish.chat.turns import Turn, find_turn, place_in_history, split_reasoning
from burnish.errors import Problem, UserError
from burnish.types import Encoded, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["CannotRender", "ChatTemplate", "load_template"]


def load_template(
    tokenizer: PreTrainedTokenizerBase,
    name: str | None,
    *,
    default_system: str | None = None,
    enable_thinking: bool | None = None,
    split_special_tokens: bool = False,
) -> ChatTemplate:
    """The template of this name, else the one in this jinja file, else (`None`) the tokenizer's own.

    `default_system` goes before conversations that have no system message. `enable_thinking` is handed to the
    template where it is not None. `split_special_tokens`: see ChatTemplate. Raises UserError.
    """
    own: Any = tokenizer.chat_template
    stops: tuple[str, ...] = ()
    if name is None:
        if not own:
            remedy = f"name one with --template; those that fit it: {', '.join(fitting_names(tokenizer))}"
            raise UserError(Problem(tokenizer_place(tokenizer), "", None, "has no chat template of its own", remedy))
        source = own
    elif name not in named_templates() and (name.endswith(".jinja") or Path(os.path.expanduser(name)).is_file()):
        source = _read(str(Path(os.path.expanduser(name))))
    else:
        template = get_template(name, tokenizer)
        source, stops = template.jinja_for(tokenizer), template.stop
    renderer = Renderer(
        tokenizer,
        source,
        default_system=default_system,
        enable_thinking=enable_thinking,
        mark_look_alikes=split_special_tokens,
    )
    notes = []
    if name and own:
        replaced = Renderer(tokenizer, own, enable_thinking=enable_thinking)
        if any(_text_of(renderer, chat) != _text_of(replaced, chat) for chat in _SHORT_CHATS):
            notes = [f"template {name} renders differently from the tokenizer's own chat template, which is not used"]
    if enable_thinking is not None and "enable_thinking" not in renderer.source():
        notes.append("the chat template does not know enable_thinking: it changes nothing")
    return ChatTemplate(tokenizer, renderer, name=name or "", stops=stops, notes=notes)


class ChatTemplate:
    """Conversations to ids and back.

    Look-alikes: where a message holds the text of a special token (`<|im_end|>`, typed by a user), training does what
    serving does. By default both tokenize the rendered text as transformers does, so that the text becomes the token.
    With `split_special_tokens` both tokenize it as the plain text it is; the markers that the template itself writes
    stay tokens. In neither case does it move what is trained: spans are places in the rendered text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        renderer: Renderer,
        *,
        name: str = "",
        stops: Sequence[str] = (),
        notes: Sequence[str] = (),
    ):
        self.name = name  # "" for the tokenizer's own
        self.jinja = renderer.source()  # what is saved as chat_template.jinja
        self.notes = list(notes)  # lines for whoever loaded it to print
        self._tokenizer, self._renderer = tokenizer, renderer
        self._eos_id: Any = tokenizer.eos_token_id  # the tokenizer looks for it anew at each call
        self._encoder = TextEncoder(tokenizer)
        self._ending = find_ending(renderer, tokenizer)
        self._lead = find_lead(renderer)
        ends = [text for text in (*self._ending.known, *self._ending.headers, *stops) if is_one_token(text, tokenizer)]
        # generation ends at any of them
        self.stop_ids = list(dict.fromkeys(self._encoder.ids(Rendered(text))[0] for text in ends))
        if self._ending.tail is not None and not self._ending.marker:
            self.notes.append("the chat template ends no answer: the tokenizer's end token follows a sample's last one")
        if self._lead is None:
            self.notes.append("the chat template asks with other words than stand before an answer without reasoning")

    def prompt(self, messages: list[Message], tools: Tools = None) -> list[int]:
        """Ids to send to the model: the conversation, and the header of the answer that is asked for."""
        return self._encoder.ids(self._rendered_prompt(messages, tools))

    def prompt_text(self, messages: list[Message], tools: Tools = None) -> str:
        return self._rendered_prompt(messages, tools).text

    @property
    def writes_calls(self) -> bool:
        """Whether the tool calls of a message are in the text at all."""
        return bool(self._renderer.call_shape.sample)

    def encode(
        self, messages: list[Message], tools: Tools = None, *, train_on_prompt: bool = False, mask_history: bool = False
    ) -> list[Encoded]:
        """Ids of a conversation, and which are trained: the words of each assistant turn and its end token.

        Usually one sample. Where the template writes a turn otherwise once another follows (Qwen3 forgets thoughts),
        the turn has a sample of its own, as it was when it was given. The ids up to the last trained turn of a sample
        are always those of `prompt`; where a token would lie across that border the text is cut there, and `straddled`
        counts it. (Not so where the template asks with other words than it answers with: R1's prompt opens a thought.)
        Where the template writes no end token, the tokenizer's stands behind the last answer of a sample.

        `train: False` takes a turn out, `mask_history` all but the last. `train_on_prompt` trains every token that no
        earlier sample held. An answer that nobody asked for, the first of all messages, is not trained.
        Raises CannotRender.
        """
        if train_on_prompt and mask_history:
            message = "trains the prompt, and mask_history takes all but the last answer out of the loss"
            raise UserError(Problem("settings", "train_on_prompt", True, message, "give one of the two"))
        chat, tools = self._renderer.chat(messages), self._renderer.tools(tools)
        whole = self._renderer.render(chat, tools)
        added = len(chat) - len(messages)  # the default system message
        answers = [i for i, message in enumerate(chat) if message["role"] == "assistant" and i > 0]
        wanted = [i for i in answers if messages[i - added].get("train", True)]
        if mask_history:
            wanted = [i for i in wanted if i == answers[-1]]
        if not wanted and not train_on_prompt:
            raise CannotRender("no turn of the assistant is to be trained")
        turns = [self._turn(chat, i, tools, whole) for i in wanted]
        drafts = draft_samples(self._encoder, whole, turns)
        if not train_on_prompt:
            return [draft.encoded(self._eos_id, self.stop_ids) for draft in drafts]
        silent = [i for i in answers if i not in wanted]
        drafts = drafts or [Draft(self._encoder, whole)]
        left_out = []
        for draft in drafts:
            end = len(chat) if draft.rendered is whole else wanted[turns.index(draft.turns[-1])] + 1
            left_out.append([self._place(draft, chat[:end], i, tools, whole) for i in silent if i < end])
        return with_prompts(drafts, left_out, self._eos_id, self.stop_ids)

    def _place(self, draft: Draft, chat: Chat, index: int, tools: Tools, whole: Rendered) -> range:
        """Which tokens of a sample a turn is: as it was given, or as the template writes it now."""
        as_given = draft.indices(self._turn(chat, index, tools, whole))
        if as_given is not None:
            return as_given
        return draft.holding(*place_in_history(self._renderer, chat, index, tools), self.stop_ids)

    def identity(self) -> dict[str, Any]:
        """All that decides what `encode` gives, but for the tokenizer."""
        return {**self._renderer.identity(), "stop_ids": self.stop_ids}

    def parse(self, ids: Sequence[int]) -> Message:
        """What the model answered, up to its end token: words, thoughts (`reasoning_content`) and tool calls.

        Calls in Hermes's, Qwen's and Llama 3's format become `tool_calls`, others stay text.
        """
        stop = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        answer = list(ids[:stop])
        text: Any = self._tokenizer.decode(answer, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return self.parse_text(text)

    def parse_text(self, text: str) -> Message:
        """`parse` for the text of an answer, special tokens included, up to its end token."""
        text = text.removesuffix(self._ending.before)
        if self._lead and self._lead.isspace():
            text = text.removeprefix(self._lead)
        reasoning, words = split_reasoning(text, opened=self._opens_thought)
        content, calls = self._read_calls(words)
        if self._special is not None:
            content = self._special.sub("", content)
        message: Message = {"role": "assistant", "content": content}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message

    def _rendered_prompt(self, messages: list[Message], tools: Tools) -> Rendered:
        chat = self._renderer.chat(messages)
        return self._renderer.render(chat, self._renderer.tools(tools), generation=True)

    def _turn(self, chat: Chat, index: int, tools: Tools, whole: Rendered) -> Turn:
        return find_turn(self._renderer, self._ending, chat, index, tools, whole)

    @cached_property
    def _special(self) -> re.Pattern[str] | None:
        special = [t.content for t in self._tokenizer.added_tokens_decoder.values() if t.special]
        return re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True)))) if special else None

    @cached_property
    def _opens_thought(self) -> bool:
        try:
            return self.prompt_text([{"role": "user", "content": "a"}]).rstrip().endswith("<think>")
        except CannotRender:
            return False

    @cached_property
    def _read_calls(self) -> Any:
        """The format that reads what the template itself writes for a call."""
        sample = self._renderer.call_shape.sample
        for stop in self._ending.known:
            sample = sample.partition(stop)[0]
        return next((read for read in FORMATS if read(split_reasoning(sample)[1])[1]), no_calls)


def _read(path: str) -> str:
    import jinja2
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        text = Path(path).read_text(encoding="utf-8")
        _compile_jinja_template(text)
    except jinja2.TemplateSyntaxError as error:
        message = f"is not a jinja template: {error.message}"
        raise UserError(Problem(f"{path}:{error.lineno}", "", None, message)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(Problem("the chat template", "template", path, f"cannot be read: {error}")) from error
    return text


_SHORT_CHATS: tuple[Chat, ...] = (
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
)


def _text_of(renderer: Renderer, chat: Chat) -> str | None:
    try:
        return renderer.render(chat).text + "\n" + renderer.render(chat[:-1], generation=True).text
    except CannotRender:
        return None
