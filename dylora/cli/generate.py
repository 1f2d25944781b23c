"""`dylora generate`: an answer, or those to a file of prompts; on request how it was routed."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dylora.cli.options import AnswerOptions, SpeakerOptions, check_out
from dylora.fields import option, shown

if TYPE_CHECKING:
    from dylora.data.record import Record
    from dylora.serving.answering import Row, Sampling
    from dylora.serving.engine import Speaker

WINDOW = 16  # batches of answers that a kill loses, at most


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(AnswerOptions, SpeakerOptions):
    """Answer a prompt, or every prompt of a file, with a checkpoint."""

    prompt: str | None = None
    """The instruction, or the text itself."""
    prompts: str | None = option(None, metavar="FILE")
    """Instead of it a file: rows (.jsonl, .json, .csv, .tsv, .parquet) with prompt, with
    instruction and maybe input, or with messages; else a prompt a line."""
    out: str | None = option(None, metavar="FILE")
    """With --prompts: the .jsonl that gets a line for each, in their order, as they come."""
    batch_size: int = option(8, least=1)
    """With --prompts: prompts that are answered together."""
    raw: bool = False
    """Continue the prompt as it stands, without a template."""
    show_routing: bool = False
    """Show which experts each token used."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("give either --prompt TEXT or --prompts FILE")
        if (self.prompts is None) != (self.out is None):
            raise ValueError("--prompts FILE and --out FILE belong together")
        if self.prompts is not None and self.show_routing:
            raise ValueError("--show_routing is of one --prompt")


def run(options: GenerateOptions, overrides: list[str]) -> None:
    """Print what the mixture answers, or write it."""
    asked = [{"prompt": options.prompt}]
    if options.prompts is not None:
        asked = list(read_prompts(Path(options.prompts), raw=options.raw))
    if options.out is not None and Path(options.out).exists():
        raise FileExistsError(f"{options.out} exists: give another --out, or remove it")
    check_out(options.out)
    speaker = options.speaker()
    rows = _rows(speaker, asked, options.sampling(), raw=options.raw)
    if options.out is not None:
        _answer_file(speaker, asked, rows, Path(options.out), options.batch_size)
        return
    speaker.answer(rows)
    print(rows[0].text)
    _tell_routing(speaker, rows[0], show=options.show_routing)


def read_prompts(file: Path, *, raw: bool = False) -> Iterator[dict[str, Any]]:
    """Each with prompt and maybe input, or with messages; raw: without a template for these.

    Raises ValueError naming file and line, FileNotFoundError where there is no such file.
    """
    from dylora.data.readers import READERS, read_records
    from dylora.data.record import Columns
    from dylora.data.text_file import read_text_file
    from dylora.data.unpacked import plain_name
    from dylora.storage.safe_io import open_regular

    open_regular(file).close()  # no folder, and no set of the hub
    ending = Path(plain_name(file)).suffix
    has_rows = ending in READERS and READERS[ending] is not read_text_file
    read = read_records(str(file), columns=None) if has_rows else read_text_file(file, Columns())
    for record in read:
        if record.problem:
            raise ValueError(f"{record.location}: {record.problem}")
        if has_rows:
            yield _asked(record, raw=raw)
        else:
            lines = (line.rstrip("\r") for line in record.fields["text"].split("\n"))
            yield from ({"prompt": line} for line in lines if line.strip())


def _asked(record: "Record", *, raw: bool) -> dict[str, Any]:
    """What a row asks. Raises ValueError naming file and line."""
    from dylora.serving.engine import check_messages

    fields = {key: value for key, value in record.fields.items() if value is not None}
    try:
        if "instruction" in fields:
            asked = {"prompt": fields["instruction"], "input": fields.get("input", "")}
        elif "messages" in fields:
            check_messages(fields["messages"])
            asked = {"messages": fields["messages"]}
        elif "prompt" in fields:
            asked = {"prompt": fields["prompt"]}
        else:
            raise ValueError("has neither prompt, instruction nor messages")
        for key in asked.keys() - {"messages"}:
            if not isinstance(asked[key], str):
                what = "instruction" if "instruction" in fields and key == "prompt" else key
                raise ValueError(f"{what} is {shown(asked[key])}, but must be a text")
        if raw and ("messages" in asked or asked.get("input")):
            what = "messages" if "messages" in asked else "input"
            raise ValueError(f"has {what}, which only a template takes: leave out --raw")
        try:
            json.dumps(asked, ensure_ascii=False).encode()
        except (TypeError, ValueError):
            raise ValueError("holds what is no text and no JSON") from None
    except ValueError as error:
        raise ValueError(f"{record.location}: {error}") from None
    return asked


def _rows(
    speaker: "Speaker", asked: list[dict[str, Any]], sampling: "Sampling", *, raw: bool
) -> "list[Row]":
    """A row for each prompt. Raises ValueError for one that is too long or no conversation."""
    from dylora.serving.answering import Row, room_after

    rows = []
    for number, one in enumerate(asked, 1):
        try:
            if "messages" in one:
                ids = speaker.conversation(one["messages"])
            elif raw:
                ids = speaker.text(one["prompt"])
            else:
                ids = speaker.question(one["prompt"], one.get("input", ""))
            rows.append(Row(ids, sampling))
            room_after(speaker.model, rows[-1])
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}" if len(asked) > 1 else error) from None
    return rows


def _answer_file(
    speaker: "Speaker", asked: list[dict[str, Any]], rows: "list[Row]", out: Path, batch_size: int
) -> None:
    """A line of JSON for each prompt, in their order, written as they are answered.

    Prompts of similar length share a batch, among the next WINDOW batches.
    """
    from tqdm import tqdm

    size, written = WINDOW * batch_size, 0
    with out.open("x", encoding="utf-8") as stream, tqdm(total=len(rows), disable=None) as bar:
        try:
            for begin in range(0, len(rows), size):
                window = rows[begin : begin + size]
                order = sorted(window, key=lambda row: len(row.prompt))
                for first in range(0, len(order), batch_size):
                    speaker.answer(batch := order[first : first + batch_size])
                    bar.update(len(batch))
                for one, row in zip(asked[begin:], window, strict=False):
                    told = {**one, "text": row.text, "finish_reason": row.finish}
                    stream.write(json.dumps(told, ensure_ascii=False) + "\n")
                stream.flush()
                written += len(window)
        finally:
            bar.close()
            whole = "" if written == len(rows) else f" of {len(rows)}"
            print(f"wrote {written}{whole} answers to {out}")
            if not written:
                out.unlink()  # so that it can be tried again


def _tell_routing(speaker: "Speaker", row: "Row", *, show: bool) -> None:
    """Which skill a prompt went to, or on request which expert led each token."""
    import torch

    from dylora.evaluation.loading import decode_after

    model, tokenizer, length = speaker.model, speaker.tokenizer, len(row.prompt)
    tokens = [*row.prompt, *row.tokens]
    routed = any(True for _ in model.routers())  # not by constant weights
    if routed and model.config.router_scope == "prompt" and model.skill_library:
        say_skill(model, torch.tensor(row.prompt, device=model.device), chances=show)
    elif show:
        output = torch.tensor([tokens], device=model.device)
        shares = model.get_routing_weights(output)[0].mean(1)  # [S, E], averaged over sites
        print(f"\nmean shares: {' '.join(f'{share:.0%}' for share in shares.mean(0).tolist())}")
        for place, share in enumerate(shares[length:], length):
            shown = decode_after(tokenizer, tokens[:place], tokens[place : place + 1])
            leader = int(share.argmax())
            print(f"{shown!r:16} expert {leader} ({float(share[leader]):.0%})")


def say_skill(model: Any, prompt: Any, *, chances: bool) -> None:
    """Which skill a prompt [S] of token ids asks for, or that it is unlike every known one."""
    from dylora.evaluation.loading import note

    choice = model.skill_library.which(prompt)
    if not choice.known:
        far = f"its distance is {choice.distance:.2f} × what is far from {choice.skill}"
        note(f"the prompt is unlike every known skill ({far}): answered by the base alone")
    if chances:
        print(f"\nskill: {choice.skill}, expert {model.skill_library.expert_of(choice.skill)}")
        ranked = sorted(choice.log_probabilities.items(), key=lambda item: -item[1])
        print(", ".join(f"{name} {math.exp(chance):.1%}" for name, chance in ranked[:10]))
