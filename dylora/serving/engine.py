"""A mixture that answers: its prompt format, and a thread in which what waits shares a batch."""

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.base_models import choose_device
from dylora.config import Quantization
from dylora.data.prompts import encode_prompts
from dylora.data.templates import Chat, Template, load_template, question, recorded_template
from dylora.evaluation.loading import change_routing, note
from dylora.model import DyLoRA_MoE
from dylora.serving.answering import Row, answer, room_after
from dylora.storage.checkpoint import Checkpoint

Message = Mapping[str, Any]  # role and content
ROLES = ("system", "user", "assistant")


class Speaker:
    """A mixture with its tokenizer. Prompts may be encoded in several threads at once."""

    def __init__(
        self,
        model: DyLoRA_MoE,
        tokenizer: PreTrainedTokenizerBase,
        template: Template | None = None,
    ) -> None:
        """template: none: that of the model's training."""
        self.model, self.tokenizer = model, tokenizer
        self.template = template or recorded_template(model.training_record, tokenizer)
        self.ends = set(self.template.end_ids)
        # Whether text may be special tokens is a setting of the tokenizer that each call writes.
        self._encoding = threading.Lock()

    @classmethod
    def open(
        cls,
        source: str | Checkpoint,
        base: str | None = None,
        *,
        device: str = "auto",
        quantization: Quantization | None = None,
        routing: Mapping[str, Any] | None = None,
        template: str | None = None,
    ) -> "Speaker":
        """A checkpoint on its base, in evaluation mode; routing: arguments of `change_routing`;
        template: as `load_template` takes it, none: that of the training.

        Raises ValueError or FileNotFoundError for what does not load.
        """
        opened = Checkpoint.open(source, note)
        where = choose_device(device, "device")
        spec = opened.base_spec(base, device=where, quantization=quantization)
        model = DyLoRA_MoE.from_pretrained(opened, spec).eval()
        change_routing(model, **(routing or {}))
        if base is None:  # whoever made the checkpoint chose it
            note(f"base: {spec.name}, as {opened.path} names it")
        tokenizer = opened.tokenizer(spec)
        other = None if template is None else load_template(template, tokenizer)
        return cls(model, tokenizer, other)

    @property
    def words(self) -> int:
        """Ids below this are tokens that the base can read."""
        embedding: Any = self.model.base.get_input_embeddings()  # some have fewer than words
        return min(len(self.tokenizer), len(embedding.weight))

    def conversation(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that ends with what is to be answered.

        Raises ValueError for a role that is not known, for one that ends with an answer, and for
        what the template refuses.
        """
        check_messages(messages)
        chat = Chat([dict(message) for message in messages])
        with self._encoding:
            return self.template.prompts([chat])[0]

    def question(self, instruction: str, input: str = "") -> list[int]:
        """Token ids of an instruction with its further input."""
        with self._encoding:
            return self.template.prompts([question(self.template, instruction, input)])[0]

    def text(self, text: str) -> list[int]:
        """Token ids of a text that is to be continued as it stands."""
        with self._encoding:
            return encode_prompts(self.tokenizer, [text])[0]

    def answer(self, rows: Sequence[Row]) -> None:
        """Fill the rows, in one batch; see `dylora.serving.answering.answer`."""
        answer(self.model, self.tokenizer, rows, self.ends)


def check_messages(messages: Any) -> None:
    """Raises ValueError for what is no conversation that ends with what is to be answered."""
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise ValueError("messages must be a list of objects with role and content")
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            raise ValueError(f"a message needs a text and one of the roles {', '.join(ROLES)}")
    if not messages or messages[-1].get("role") != "user":
        raise ValueError("the last message must be of the role user")


class Busy(Exception):
    """More waits than may."""


class Engine:
    """Answers what waits, up to `batch_size` rows at a time, in a thread of its own."""

    def __init__(self, speaker: Speaker, *, batch_size: int, waiting: int) -> None:
        self.speaker, self.batch_size = speaker, batch_size
        self.most = batch_size + waiting  # rows that can be here at once
        self._queue: Queue[Row | None] = Queue(waiting)
        self._thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self._thread.start()

    def submit(self, row: Row) -> None:
        """Answer it when its turn comes; `on_text` and `on_end` are called in another thread.

        Raises ValueError for a prompt that is too long, Busy when too much waits already.
        """
        room_after(self.speaker.model, row)
        try:
            self._queue.put_nowait(row)
        except Full:
            raise Busy("too many requests wait: try again later") from None

    def close(self) -> None:
        """End the thread, after what waits."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            rows: list[Row | None] = [first]
            with suppress(Empty):
                while rows[-1] is not None and len(rows) < self.batch_size:
                    rows.append(self._queue.get_nowait())
            self._answer([row for row in rows if row is not None])
            if rows[-1] is None:
                return

    def _answer(self, rows: list[Row]) -> None:
        wanted = [row for row in rows if not row.cancelled]
        try:
            if wanted:
                self.speaker.answer(wanted)
        except Exception as error:  # whoever asked is told, and the next batch is answered
            for row in wanted:
                if row.finish is None:
                    row.error = error
        for row in rows:
            if row.finish is None:  # the others were told when they ended
                row.on_end(row)
