"""Chat templates: how a conversation becomes token ids, and which of them are trained on.

Training, generation and benchmarks use the same one, and a checkpoint records it as a text:
PROMPT_WITH_INPUT stands for alpaca, PLAIN for plain, and any other is a Jinja template, which
transformers renders in its sandbox.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.data.prompts import (
    PROMPT_WITH_INPUT,
    common_length,
    encode,
    encode_answers,
    encode_prompts,
    eos_token_id,
    format_prompt,
)
from dylora.data.record import BadRecord
from dylora.fields import nearest, shown
from dylora.storage.safe_io import read_bytes
from dylora.storage.schema import MAX_TEMPLATE

NAMES = ("alpaca", "base", "chatml", "plain")
PLAIN = "{instruction}\n\n{input}\n"
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_ANSWER = "Paris"  # of the conversation with which a template is tried

Parts = list[list[int]]
"""Token ids, alternately not trained on and trained on."""


class Chat(NamedTuple):
    """A conversation."""

    messages: list[dict[str, Any]]  # each with role and content, and maybe tool_calls and more
    tools: list[dict[str, Any]] | None = None


class Template(Protocol):
    """How conversations become token ids."""

    tokenizer: PreTrainedTokenizerBase
    name: str
    text: str
    """What a checkpoint records."""
    input_heading: str
    """Between an instruction and its further input."""

    def prompts(self, chats: Sequence[Chat]) -> list[list[int]]:
        """Ids of conversations that a model is to answer, BOS included where there is one.

        Raises ValueError for one that the template cannot render.
        """
        ...

    def examples(self, chats: Sequence[Chat]) -> list[Parts | BadRecord]:
        """Ids of whole conversations; the answers and what ends them are trained on."""
        ...

    @property
    def end_ids(self) -> list[int]:
        """The tokens with which an answer may end."""
        ...


def question(template: Template, instruction: str, input: str = "") -> Chat:
    """An instruction as a conversation."""
    content = f"{instruction}{template.input_heading}{input}" if input else instruction
    return Chat([{"role": "user", "content": content}])


def load_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that `data.template` names.

    Raises ValueError for an unknown name, a file that cannot be read, a base without a template,
    and a template whose answers would have no end.
    """
    eos_token_id(tokenizer)
    if name in ("alpaca", "plain"):
        return TextTemplate(tokenizer, name)
    if name == "chatml":
        return JinjaTemplate(tokenizer, _chatml(tokenizer), name)
    if name == "base":
        found: Any = tokenizer.chat_template
        found = found.get("default") if isinstance(found, Mapping) else found
        if not found:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template: set data.template "
                "to alpaca, chatml, plain, or a Jinja file"
            )
        return JinjaTemplate(tokenizer, found, "of the base")
    file = Path(name).expanduser()
    if not (file.exists() or file.suffix in (".jinja", ".jinja2", ".j2")):
        raise ValueError(
            f"data.template is {shown(name)}, neither a name nor a Jinja file"
            f"{nearest(name, list(NAMES))}"
        )
    try:
        return JinjaTemplate(tokenizer, read_bytes(file, MAX_TEMPLATE).decode(), str(file))
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8") from None


def recorded_template(training: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template of the latest training that a record tells of; alpaca where it tells of none.

    Raises ValueError for a text that is no template.
    """
    for record in (training, *reversed(training.get("earlier", []))):
        text = (record.get("data") or {}).get("prompt")
        if text not in (None, PROMPT_WITH_INPUT, PLAIN):
            return JinjaTemplate(tokenizer, text, "of the checkpoint")
        if text is not None:
            return TextTemplate(tokenizer, "plain" if text == PLAIN else "alpaca")
    return TextTemplate(tokenizer, "alpaca")


class TextTemplate:
    """Headings in plain words, each answer ended by EOS. Text that reads like a special token stays
    text, and where an answer begins, a token does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        alpaca = name == "alpaca"
        self.text = PROMPT_WITH_INPUT if alpaca else PLAIN
        self.input_heading = "\n\n### Input:\n" if alpaca else "\n\n"

    @property
    def end_ids(self) -> list[int]:
        return [eos_token_id(self.tokenizer)]

    def prompts(self, chats: Sequence[Chat]) -> list[list[int]]:
        try:
            encoded = self._encode([self._turns(chat) for chat in chats])
        except BadRecord as problem:
            raise ValueError(str(problem)) from None
        return [[token for part in parts for token in part] for parts in encoded]

    def examples(self, chats: Sequence[Chat]) -> list[Parts | BadRecord]:
        found: list[Parts | BadRecord] = []
        turns = []
        for chat in chats:
            try:
                turns.append([turn for turn in self._turns(chat) if turn[1] is not None])
                found.append([])
            except BadRecord as problem:
                found.append(problem)
        encoded = iter(self._encode(turns))
        return [one if isinstance(one, BadRecord) else next(encoded) for one in found]

    def _turns(self, chat: Chat) -> list[tuple[str, str | None]]:
        """What stands before each answer, and the answer; None where there is none yet."""
        turns: list[tuple[str, str | None]] = []
        before = ""
        if chat.tools:
            raise BadRecord(f"the template {self.name} has no place for tools")
        for message in chat.messages:
            role, content = message["role"], message["content"]
            if role == "tool" or message.get("tool_calls"):
                raise BadRecord(f"the template {self.name} has no place for tools")
            if role == "assistant":
                turns.append((before, content))
                before = ""
            elif role == "user":
                before += format_prompt(content) if self.name == "alpaca" else f"{content}\n"
            else:
                before += f"{content}\n\n"
        return [*turns, (before, None)] if before or not turns else turns

    def _encode(self, chats: Sequence[list[tuple[str, str | None]]]) -> list[Parts]:
        """The first text of each begins with BOS; a later one follows the EOS of an answer."""
        firsts = iter(encode_prompts(self.tokenizer, [turns[0][0] for turns in chats if turns]))
        later = [before for turns in chats for before, _ in turns[1:]]
        laters = iter(encode_answers(self.tokenizer, later))
        answers = [answer for turns in chats for _, answer in turns if answer is not None]
        answered = iter(encode_answers(self.tokenizer, answers))
        eos, found = eos_token_id(self.tokenizer), []
        for turns in chats:
            parts: Parts = []
            for number, (_, answer) in enumerate(turns):
                parts.append(next(laters) if number else next(firsts))
                if answer is not None:
                    parts.append([*next(answered), eos])
            found.append(parts)
        return found


class JinjaTemplate:
    """A template in the way of transformers' apply_chat_template, whose ids these are. Answers are
    told by its generation marks, or else by what each adds to the conversation before it."""

    input_heading = "\n\n"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> None:
        """Raises ValueError where it cannot be rendered, or an answer has no end of its own."""
        self.tokenizer, self.text, self.name = tokenizer, text, name
        self.has_marks = _MARKS.search(text) is not None
        self.end_ids = [eos_token_id(tokenizer)]
        self._find_end()

    def prompts(self, chats: Sequence[Chat]) -> list[list[int]]:
        try:
            texts = [self._render(chat.messages, chat.tools, answer=True) for chat in chats]
        except BadRecord as problem:
            raise ValueError(str(problem)) from None
        return self._ids(texts)

    def examples(self, chats: Sequence[Chat]) -> list[Parts | BadRecord]:
        found: list[Parts | BadRecord] = []
        for chat in chats:
            try:
                found.append(self._marked(chat) if self.has_marks else self._by_difference(chat))
            except BadRecord as problem:
                found.append(problem)
        return found

    def _marked(self, chat: Chat) -> Parts:
        rendered = self._apply(
            chat.messages, chat.tools, tokenize=True, return_assistant_tokens_mask=True
        )
        parts: Parts = [[]]
        for token, trained in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True):
            if trained != (len(parts) + 1) % 2:
                parts.append([])
            parts[-1].append(token)
        return parts

    def _by_difference(self, chat: Chat) -> Parts:
        """Each answer is what it adds to what stands before it, up to the token that ends it."""
        answers = [i for i, turn in enumerate(chat.messages) if turn["role"] == "assistant"]
        whole = self._render(chat.messages, chat.tools)
        texts, last = [], ""
        for index in answers:
            before = self._render(chat.messages[:index], chat.tools, answer=True)
            after = self._render(chat.messages[: index + 1], chat.tools)
            if not (
                before.startswith(last) and after.startswith(before) and whole.startswith(after)
            ):
                raise BadRecord(
                    f"the template {self.name} writes message {index + 1} otherwise with what "
                    "follows or without it: only generation marks could tell the answers"
                )
            texts += [before, after]
            last = after
        ids, *places = self._ids([whole, *texts])
        parts, begin = [], 0
        for text, prefix in zip(texts, places, strict=True):
            end = len(ids) if text == whole else common_length(prefix, ids)
            if len(parts) % 2:  # of an answer: nothing after its end
                ends = [i + 1 for i in range(begin, end) if ids[i] in self.end_ids]
                end = ends[-1] if ends else end
            parts.append(ids[begin:end])
            begin = end
        return [*parts, ids[begin:]] if ids[begin:] else parts

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return encode(self.tokenizer, texts, add_special_tokens=False, split_special_tokens=False)

    def _render(
        self, messages: list[dict[str, Any]], tools: Any = None, *, answer: bool = False
    ) -> str:
        return self._apply(messages, tools, tokenize=False, add_generation_prompt=answer)

    def _apply(self, messages: list[dict[str, Any]], tools: Any, **options: Any) -> Any:
        """Raises BadRecord for what the template refuses or has no place for."""
        for word, used in (
            ("tools", bool(tools)),
            ("tool_calls", any(message.get("tool_calls") for message in messages)),
        ):
            if used and word not in self.text:
                raise BadRecord(f"the template {self.name} has no place for {word}")
        try:
            tokenizer: Any = self.tokenizer
            return tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.text, **options
            )
        except Exception as error:  # a template may raise whatever it likes
            line = next(iter(str(error).splitlines()), type(error).__name__)
            raise BadRecord(f"the template {self.name} cannot render it: {line}") from error

    def _find_end(self) -> None:
        messages = [
            {"role": "user", "content": "Where?"},
            {"role": "assistant", "content": _ANSWER},
        ]
        try:
            text = self._render(messages)
            asked, heading = self._render(messages[:1]), self._render(messages[:1], answer=True)
            follows = text.removeprefix(asked).lstrip().startswith(_ANSWER)  # as Mistral's
            if asked == heading and not follows:
                raise BadRecord(f"the template {self.name} does nothing for add_generation_prompt")
        except BadRecord as problem:
            raise ValueError(str(problem)) from None
        tail = text.rpartition(_ANSWER)[2]
        [ids] = self._ids([tail.lstrip()]) if tail.strip() else [[]]
        tokenizer: Any = self.tokenizer
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        if not ids or ids[0] not in special:
            raise ValueError(
                f"the template {self.name} ends an answer with {shown(tail)}, which is no token of "
                "this tokenizer, so answers would have no end: let it write {{ eos_token }} there"
            )
        self.end_ids = sorted({*self.end_ids, ids[0]})
        parts = self.examples([Chat(messages)])[0]
        trained = [] if isinstance(parts, BadRecord) else [i for part in parts[1::2] for i in part]
        if ids[0] not in trained:
            raise ValueError(
                f"the template {self.name} does not train on {shown(tail)}, which ends an answer, "
                "so none would end: put it between the generation marks"
            )


def _chatml(tokenizer: PreTrainedTokenizerBase) -> str:
    """ChatML for this tokenizer: BOS where it begins a text with it, and where it has no <|im_end|>
    the answers end in its EOS."""
    end = "'<|im_end|>'" if "<|im_end|>" in tokenizer.get_vocab() else "eos_token"
    begins = encode_prompts(tokenizer, ["a"])[0][:1] == [tokenizer.bos_token_id]
    return (
        ("{{- bos_token }}" if begins else "")
        + "{%- for message in messages %}"
        + "{{- '<|im_start|>' + message['role'] + '\\n' }}"
        + "{%- if message['role'] == 'assistant' %}"
        + f"{{% generation %}}{{{{- message['content'] + {end} }}}}{{% endgeneration %}}"
        + f"{{%- else %}}{{{{- message['content'] + {end} }}}}{{%- endif %}}"
        + "{{- '\\n' }}{%- endfor %}"
        + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
