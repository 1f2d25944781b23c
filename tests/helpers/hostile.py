"""Files that cannot be trusted: each case harms a good adapter, checkpoint, run, data file or
config, and says what the error must name.
"""

import hashlib
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dylora.storage.manifest import MANIFEST
from dylora.storage.peft_config import CONFIG_FILE
from dylora.storage.peft_format import WEIGHTS_FILE
from harm import (
    GIB,
    SECRET,
    Calls,
    as_type,
    claims_more,
    content,
    doubled_name,
    fill,
    first,
    folder,
    header_text,
    in_archive,
    in_header,
    in_json,
    in_state,
    in_tensors,
    link,
    moved_out,
    one_number,
    parquet,
    pipe,
    saved,
    second_pickle,
    shared_lists,
    sparse,
    tuples_for_a_key,
    twice,
    vast_header,
)


class Case(NamedTuple):
    """One kind of harm."""

    name: str
    file: str  # what is harmed, below the folder; the error names it
    damage: Callable[[Path], None]  # given that file
    words: str  # in the error
    where: str = "description"  # what finds it: the description, an adapter, or the model


# The cases


def _adapter(name: str, file: str, damage: Callable[[Path], None], words: str) -> Case:
    return Case(name, file, damage, words, "adapter")


def _drop_to_one(header: dict[str, Any]) -> None:
    """All tensors in the bytes of the first."""
    for entry in header.values():
        entry.update(shape=header[min(header)]["shape"])
        entry.update(data_offsets=header[min(header)]["data_offsets"])


def _with_hole(header: dict[str, Any]) -> None:
    last = max(header.values(), key=lambda entry: entry["data_offsets"])
    last["data_offsets"] = [offset + 4 for offset in last["data_offsets"]]


DEEP = b'{"a": ' + b"[" * 100_000
MANY = ("{" + "".join(f'"{n}": 0, ' for n in range(100_000)) + '"0": 0}').encode()
ESCAPES = "\x1b[2J\x1b]0;owned\x07"
ADAPTER = [
    _adapter("nested without end", CONFIG_FILE, content(DEEP), "not valid JSON"),
    _adapter(
        "nested too deep",
        CONFIG_FILE,
        in_json("base_model_name_or_path", to=b"[" * 200 + b"]" * 200),
        "lists and mappings in one another",
    ),
    _adapter("a gibibyte of JSON", CONFIG_FILE, sparse(GIB), "may have 8,388,608"),
    _adapter("a key twice", CONFIG_FILE, twice("r", "3"), "'r' stands twice"),
    _adapter("a key twice among many", CONFIG_FILE, content(MANY), "'0' stands twice"),
    _adapter("NaN", CONFIG_FILE, in_json("lora_alpha", to=b"NaN"), "NaN is no number"),
    _adapter("infinity", CONFIG_FILE, in_json("lora_alpha", to=b"-Infinity"), "Infinity is no"),
    _adapter("1e999", CONFIG_FILE, in_json("lora_alpha", to=b"1e999"), "lora_alpha is inf"),
    _adapter("1e308", CONFIG_FILE, in_json("lora_alpha", to=1e308), "lora_alpha is 1e+308"),
    _adapter("5,000 digits", CONFIG_FILE, in_json("r", to=b"9" * 5000), "not valid JSON"),
    _adapter("400 digits", CONFIG_FILE, in_json("lora_alpha", to=b"9" * 400), "lora_alpha is 999"),
    _adapter("a vast rank", CONFIG_FILE, in_json("r", to=10**9), "r is 1000000000"),
    _adapter("a negative rank", CONFIG_FILE, in_json("r", to=-3), "r is -3"),
    _adapter("a rank that is true", CONFIG_FILE, in_json("r", to=True), "r is True"),
    _adapter("a flag that is a text", CONFIG_FILE, in_json("use_rslora", to="no"), "use_rslora is"),
    _adapter(
        "a vast rank in a pattern",
        CONFIG_FILE,
        in_json("rank_pattern", to={"q_proj": 10**12}),
        "rank_pattern",
    ),
    _adapter(
        "a regular expression for targets",
        CONFIG_FILE,
        in_json("target_modules", to="(a+)+$"),
        "target_modules is '(a+)+$'",
    ),
    _adapter(
        "regular expressions in a list",
        CONFIG_FILE,
        in_json("target_modules", to=["q_proj", ".*(x|x)*y"]),
        "no plain name",
    ),
    _adapter(
        "a regular expression for layers",
        CONFIG_FILE,
        in_json("layers_pattern", to="(h|h)*"),
        "layers_pattern",
    ),
    _adapter(
        "a regular expression for ranks",
        CONFIG_FILE,
        in_json("rank_pattern", to={"(a*)*b": 3}),
        "rank_pattern names",
    ),
    _adapter("no UTF-8", CONFIG_FILE, content(b'{"r": "\xff\xfe"}'), "not valid JSON"),
    _adapter("a pipe for settings", CONFIG_FILE, pipe, "pipe"),
    _adapter("a device for settings", CONFIG_FILE, link("/dev/zero"), "out of its folder"),
    _adapter("settings that are a link", CONFIG_FILE, link("../secret"), "out of its folder"),
    _adapter("a folder for settings", CONFIG_FILE, folder, "a folder"),
    _adapter(
        "100 GB claimed",
        WEIGHTS_FILE,
        in_header(lambda h: first(h, shape=[25 * GIB], data_offsets=[0, 100 * GIB])),
        "not a readable safetensors file",
    ),
    _adapter("a header of 2^63", WEIGHTS_FILE, header_text(b"{}", 1 << 63), "9,223,372,036"),
    _adapter("a header beyond the file", WEIGHTS_FILE, header_text(b"{}", 100), "header of 100"),
    _adapter("a header of 1 GiB", WEIGHTS_FILE, vast_header, "a header of 1,073,741,824"),
    _adapter(
        "more bytes than tensors", WEIGHTS_FILE, sparse(2 * GIB), "not a readable safetensors file"
    ),
    _adapter("a header nested without end", WEIGHTS_FILE, header_text(DEEP), "not valid JSON"),
    _adapter("a header that is a list", WEIGHTS_FILE, header_text(b"[]"), "not a JSON object"),
    _adapter(
        "overlapping tensors",
        WEIGHTS_FILE,
        in_header(_drop_to_one),
        "not a readable safetensors file",
    ),
    _adapter(
        "a hole between tensors",
        WEIGHTS_FILE,
        in_header(_with_hole),
        "not a readable safetensors file",
    ),
    _adapter(
        "offsets beyond the file",
        WEIGHTS_FILE,
        in_header(lambda h: first(h, data_offsets=[1 << 40, (1 << 40) + 384])),
        "not a readable safetensors file",
    ),
    _adapter(
        "offsets that run backwards",
        WEIGHTS_FILE,
        in_header(lambda h: first(h, data_offsets=[96, 0])),
        "not a readable safetensors file",
    ),
    _adapter(
        "a shape whose product overflows",
        WEIGHTS_FILE,
        in_header(lambda h: first(h, shape=[1 << 62, 4])),
        "not a readable safetensors file",
    ),
    _adapter(
        "a negative shape",
        WEIGHTS_FILE,
        in_header(lambda h: first(h, shape=[-3, -8])),
        "not a readable safetensors file",
    ),
    _adapter("a name twice", WEIGHTS_FILE, doubled_name, "stands twice"),
    _adapter(
        "an entry of a header with more",
        WEIGHTS_FILE,
        in_header(lambda h: first(h, code="x")),
        "dtype, shape and data_offsets alone",
    ),
    _adapter("whole numbers", WEIGHTS_FILE, as_type("lora_A.weight", torch.int64), "of type I64"),
    _adapter("truths", WEIGHTS_FILE, as_type("lora_A.weight", torch.bool), "of type BOOL"),
    _adapter(
        "eight bits",
        WEIGHTS_FILE,
        as_type("lora_A.weight", torch.float8_e4m3fn),
        "of type F8_E4M3",
    ),
    _adapter(
        "complex numbers",
        WEIGHTS_FILE,
        as_type("lora_B.weight", torch.complex64),
        "of type C64",
    ),
    _adapter("NaN in A", WEIGHTS_FILE, fill("lora_A.weight", torch.nan), "not finite"),
    _adapter("infinity in B", WEIGHTS_FILE, fill("lora_B.weight", torch.inf), "not finite"),
    _adapter(
        "a weight of the base",
        WEIGHTS_FILE,
        in_tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2, 2)})),
        "not a part of the adapter",
    ),
    _adapter(
        "escapes in a name",
        WEIGHTS_FILE,
        in_tensors(lambda t: t.update({f"base_model.model.{ESCAPES}": torch.ones(2)})),
        "\\x1b[2J",
    ),
    _adapter("a pickle for tensors", WEIGHTS_FILE, saved(dict), "header"),
    _adapter("a pipe for tensors", WEIGHTS_FILE, pipe, "pipe"),
    _adapter("tensors of 100 GB", WEIGHTS_FILE, sparse(100 * GIB), "bytes"),
    _adapter("tensors that are a link", WEIGHTS_FILE, moved_out, "out of its folder"),
]


def _experts(*changes: dict[str, Any], more: int = 0) -> Callable[[Path], None]:
    """Change rows of the table, and repeat the last one with its number."""

    def change(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = [row | new for row, new in zip(table, (*changes, {}, {}), strict=False)]
        for _ in range(more):
            rows.append(rows[-1] | {"name": f"expert_{len(rows)}"})
        return rows

    return in_json("experts", to=change)


def _moe(key: str, to: Any) -> Callable[[Path], None]:
    return in_json("moe", key, to=to)


CONFIG, ROUTER = "config.json", "router.safetensors"
CHECKPOINT = [
    Case("10^9 experts", CONFIG, _moe("num_experts", 10**9), "num_experts is 1000000000"),
    Case("more experts than rows", CONFIG, _moe("num_experts", 60_000), "experts lists 2"),
    Case("a vast rank for all", CONFIG, _moe("r", 10**9), "r is 1000000000"),
    Case("a negative rank for all", CONFIG, _moe("r", -1), "r is -1"),
    Case("a rank that is a text", CONFIG, _moe("r", "3"), "r is '3'"),
    Case("an alpha that is NaN", CONFIG, _moe("lora_alpha", b"NaN"), "NaN is no number"),
    Case("an alpha of 1e999", CONFIG, _moe("lora_alpha", b"1e999"), "lora_alpha is inf"),
    Case("an alpha of 1e308", CONFIG, _moe("lora_alpha", 1e308), "lora_alpha is 1e+308"),
    Case("a temperature of nothing", CONFIG, _moe("router_temperature", None), "is null"),
    Case("ranks without end", CONFIG, _moe("expert_ranks", [1] * 100_000), "expert_ranks is"),
    Case(
        "a router of another width", CONFIG, _moe("router_hidden_size", 60_000), "config.json"
    )._replace(file=ROUTER, damage=lambda f: _moe("router_hidden_size", 60_000)(f.parent / CONFIG)),
    Case("an unknown setting", CONFIG, _moe("rnak", 3), "unknown field 'rnak'"),
    Case("settings that are a list", CONFIG, in_json("moe", to=[]), "moe is []"),
    Case("a rank of 10^9", CONFIG, _experts({"rank": 10**9}), "experts[0].rank is 1000000000"),
    Case("a rank below 0", CONFIG, _experts({"rank": -2}), "experts[0].rank is -2"),
    Case("a rank of true", CONFIG, _experts({"rank": True}), "experts[0].rank is True"),
    Case("an alpha of a row of 1e308", CONFIG, _experts({"alpha": 1e308}), "alpha is 1e+308"),
    Case("a name twice in the table", CONFIG, _experts({}, {"name": "expert_0"}), "be expert_1"),
    Case("a name out of the folder", CONFIG, _experts({"name": "../../secret"}), "../../secret"),
    Case("an absolute name", CONFIG, _experts({"name": "/etc"}), "name is '/etc'"),
    Case("an unknown state", CONFIG, _experts({"state": "asleep"}), "state is 'asleep'"),
    Case("a state that is a list", CONFIG, _experts({"state": ["frozen"]}), "state is"),
    Case("none is enabled", CONFIG, _experts(*[{"enabled": False}] * 2), "none of them is enabled"),
    Case(
        "a retired one that is enabled", CONFIG, _experts({"state": "retired"}), "but the expert is"
    ),
    Case("one stack, half of it frozen", CONFIG, _experts({"state": "frozen"}), "stack is 0"),
    Case("65,537 experts", CONFIG, in_json("experts", to=[0] * 65_537), "experts is"),
    Case("a row with more", CONFIG, _experts({"code": "x"}), "'code' is not known"),
    Case("a row with less", CONFIG, in_json("experts", 0, to={"name": "expert_0"}), "is missing"),
    Case("escapes in a skill", CONFIG, _experts({"skill": ESCAPES}), "skill is '\\x1b"),
    Case("a version that is a text", CONFIG, in_json("format_version", to="2"), "version '2'"),
    Case("a version that is 2.0", CONFIG, in_json("format_version", to=2.0), "version 2.0"),
    Case("an unknown key", CONFIG, in_json("code", to="x"), "'code' is not known"),
    Case("a key twice", CONFIG, twice("experts", "[]"), "'experts' stands twice"),
    Case("nested without end", CONFIG, content(DEEP), "not valid JSON"),
    Case("half a gibibyte of JSON", CONFIG, sparse(GIB // 2), "may have 8,388,608"),
    Case("a pipe", CONFIG, pipe, "is no file"),
    Case("a link to a secret", CONFIG, link("../secret"), "out of its folder"),
    Case("a revision out of the cache", CONFIG, in_json("base_revision", to="../../x"), "revision"),
    Case("an unknown quantization", CONFIG, in_json("quantization", to="evil"), "quantization is"),
    Case(
        "escapes in the base's name", CONFIG, in_json("base_model_name_or_path", to=ESCAPES), "'\\"
    ),
    Case("a step that is a text", CONFIG, in_json("training", "step", to="x"), "training.step"),
    Case(
        "earlier: a number", CONFIG, in_json("training", "earlier", to=5), "training.earlier is 5"
    ),
    Case("earlier: a list of numbers", CONFIG, in_json("training", "earlier", to=[5]), "[0] is 5"),
    Case(
        "hashes that are a list",
        CONFIG,
        in_json("training", "data", to={"sources": [{"name": "a", "text_hashes": [1]}]}),
        "training.data.sources[0].text_hashes is [1]",
    ),
    Case(
        "ids of an earlier run that are a text",
        CONFIG,
        in_json("training", "earlier", to=[{"data": {"sources": [{"name": "a", "task_ids": ""}]}}]),
        "training.earlier[0].data.sources[0].task_ids",
    ),
    Case("data that is a number", CONFIG, in_json("training", "data", to=5), "training.data"),
    Case(
        "a data set without a name",
        CONFIG,
        in_json("training", "data", to={"sources": [{"rows": 5}]}),
        "sources[0]",
    ),
    Case(
        "rows that no router has",
        ROUTER,
        lambda f: _experts({}, {}, more=9)(f.parent / CONFIG),
        "shape [2]",
    ),
    Case(
        "a rank that no file has",
        "peft_adapters/expert_0",
        lambda f: _experts({"rank": 50_000})(f.parents[1] / CONFIG),
        "config.json means 50000",
    ),
    Case(
        "another rank of a projection",
        "peft_adapters/expert_0",
        lambda f: _moe("rank_pattern", {"q_proj": 50_000})(f.parents[1] / CONFIG),
        "config.json means 50000",
    ),
    Case(
        "maturity of another shape",
        ROUTER,
        in_tensors(lambda t: t.update({"maturity.slow": torch.ones(5)})),
        "maturity.slow has shape [5]",
    ),
    Case(
        "a router with a row more",
        ROUTER,
        in_tensors(
            lambda t: t.update(
                {k: torch.ones(3, v.shape[1]) for k, v in t.items() if k.endswith("outer.weight")}
            )
        ),
        "has shape [3",
    ),
    Case(
        "no router",
        ROUTER,
        in_tensors(lambda t: [t.pop(k) for k in list(t) if "router." in k]),
        "is missing",
    ),
    Case("a header of 2^63", ROUTER, header_text(b"{}", 1 << 63), "header"),
    Case("whole numbers in a router", ROUTER, as_type("outer.bias", torch.int32), "of type I32"),
    Case("NaN in a router", ROUTER, fill("outer.bias", torch.nan), "not finite", "model"),
    Case(
        "a tensor more", ROUTER, in_tensors(lambda t: t.update(evil=torch.ones(2))), "evil", "model"
    ),
    Case(
        "maturity in half precision",
        ROUTER,
        as_type("maturity.maturity", torch.float16),
        "float16",
        "model",
    ),
    Case("maturity above 1", ROUTER, fill("maturity.maturity", 1.5), "maturity.maturity", "model"),
    Case("evidence without end", ROUTER, fill("maturity.evidence", torch.inf), "evidence", "model"),
    Case("evidence below 0", ROUTER, fill("maturity.evidence", -1), "maturity.evidence", "model"),
    Case(
        "begun after the end", ROUTER, fill("maturity.start_progress", 7), "start_progress", "model"
    ),
    Case("a weight below 0", ROUTER, fill("fixed_weights", -1), "fixed_weights", "model"),
    Case("routers that are a link", ROUTER, moved_out, "out of its folder"),
    Case("adapters behind a link", "peft_adapters", moved_out, "out of its folder"),
]

MANIFESTS = [  # not sealed afterwards: the manifest itself is what is harmed
    Case(
        "a file outside",
        MANIFEST,
        in_json(
            "files",
            "../secret",
            to={"size": 9, "sha256": hashlib.sha256(SECRET.encode()).hexdigest()},
        ),
        "outside the folder",
    ),
    Case(
        "an absolute file",
        MANIFEST,
        in_json("files", "/etc/hostname", to={"size": 1, "sha256": "0" * 64}),
        "outside the folder",
    ),
    Case(
        "a NUL in a name",
        MANIFEST,
        in_json("files", "a\0b", to={"size": 1, "sha256": "0" * 64}),
        "outside the folder",
    ),
    Case(
        "a size of 2^70", MANIFEST, in_json("files", "config.json", "size", to=2**70), "config.json"
    ),
    Case("a size below 0", MANIFEST, in_json("files", "config.json", "size", to=-1), "config.json"),
    Case(
        "a hash that is a list",
        MANIFEST,
        in_json("files", "config.json", "sha256", to=[]),
        "config.json",
    ),
    Case("a pipe", MANIFEST, pipe, "pipe"),
    Case("a gibibyte", MANIFEST, sparse(GIB), "may have 8,388,608"),
    Case("a key twice", MANIFEST, twice("files", "{}"), "'files' stands twice"),
]

BASES = ["../evil", "a/../../evil", "https://example.com/evil", "~/evil", "file:///evil"]

STATE, MOMENTS, SCHEDULE, RANDOM = (
    *("trainer_state.json", "optimizer.pt"),
    *("scheduler.pt", "rng_state.pt"),
)
RUN = [
    Case("a step that is a text", STATE, in_json("step", to="3"), "step is '3'"),
    Case("a step below 0", STATE, in_json("step", to=-1), "step is -1"),
    Case("a step of 10^30", STATE, in_json("step", to=10**30), "step is 1000"),
    Case("a loss that is NaN", STATE, in_json("best_loss", to=b"NaN"), "NaN is no number"),
    Case("a truth that is 1", STATE, in_json("evaluation_due", to=1), "evaluation_due is 1"),
    Case(
        "fractions of another shape", STATE, in_json("fractions", "switch", to=[[1.0]]), "fractions"
    ),
    Case(
        "fractions without end",
        STATE,
        in_json("fractions", "aux_loss", 0, 0, to=b"1e999"),
        "fractions",
    ),
    Case("an order that is a list", STATE, in_json("sampler", to=[]), "sampler is []"),
    Case(
        "a place that is a text", STATE, in_json("sampler", "position", to="x"), "sampler.position"
    ),
    Case("a place beyond the end", STATE, in_json("sampler", "position", to=10**9), "position is"),
    Case("a key twice", STATE, twice("step", "7"), "'step' stands twice"),
    Case("a pipe for moments", MOMENTS, pipe, "is no file"),
    Case("moments that are a link", MOMENTS, moved_out, "out of its folder"),
    Case("moments in a list", MOMENTS, saved(lambda: [1]), "it is a list"),
    Case("moments of nobody", MOMENTS, in_state("evil", to={}), "'evil' is on one side only"),
    Case(
        "whole numbers for moments",
        MOMENTS,
        in_state(..., "exp_avg", to=lambda t: t.long()),
        "must be finite float32",
    ),
    Case(
        "doubles for moments",
        MOMENTS,
        in_state(..., "exp_avg", to=lambda t: t.double()),
        "must be finite float32",
    ),
    Case(
        "moments that repeat one number",
        MOMENTS,
        in_state(..., "exp_avg", to=lambda t: torch.ones(1).expand(t.shape)),
        "must be finite float32",
    ),
    Case("a number for moments", MOMENTS, in_state(..., "exp_avg", to=3), "must be finite float32"),
    Case(
        "NaN in moments",
        MOMENTS,
        in_state(..., "exp_avg", to=lambda t: t.fill_(torch.nan)),
        "must be finite float32",
    ),
    Case(
        "a square below 0",
        MOMENTS,
        in_state(..., "exp_avg_sq", to=lambda t: t.fill_(-1)),
        "at least 0",
    ),
    Case(
        "many steps",
        MOMENTS,
        in_state(..., "step", to=lambda t: torch.ones(3)),
        "of the shape [3]",
    ),
    Case("sparse moments", MOMENTS, in_state(..., "exp_avg", to=lambda t: t.to_sparse()), "sparse"),
    Case("a storage that claims a gibibyte", MOMENTS, claims_more, "not a readable file"),
    Case(
        "a bomb",
        MOMENTS,
        in_archive(lambda p: p + b"\0" * (64 << 20), compression=zipfile.ZIP_DEFLATED),
        "compressed",
    ),
    *(
        Case(name, file, damage, words)
        for name, damage, words in (
            ("lists that share their items", shared_lists, "unfolds to more than 4 times its size"),
            ("a key of shared tuples", tuples_for_a_key, "refers to one tuple twice"),
            ("one number for 2^31", one_number, "unfolds to more than 4 times its size"),
        )
        for file in (MOMENTS, SCHEDULE, RANDOM)
    ),
    Case("two pickles", MOMENTS, second_pickle, "name of its own"),
    Case("a call of the system", MOMENTS, saved(lambda: Calls(os.system, "touch owned")), "system"),
    Case(
        "a hundred gigabytes of zeros",
        MOMENTS,
        saved(lambda: Calls(bytearray, 10**11)),
        "bytearray",
    ),
    Case(
        "a pickle without archive",
        MOMENTS,
        content(pickle.dumps({"a": 1}, protocol=2)),
        "not a readable file",
    ),
    Case("moments of 100 GB", MOMENTS, sparse(100 * GIB), "34,359,738,368"),
    Case(
        "an unknown schedule", SCHEDULE, in_state("scheduler", "evil", to=1), "'evil' is not known"
    ),
    Case(
        "a schedule in words",
        SCHEDULE,
        in_state("scheduler", "last_epoch", to="x"),
        "last_epoch is 'x'",
    ),
    Case(
        "a rate that is NaN",
        SCHEDULE,
        in_state("scheduler", "_last_lr", 0, to=torch.nan),
        "_last_lr.0 is nan",
    ),
    Case(
        "a schedule's function replaced",
        SCHEDULE,
        in_state("scheduler", "lr_lambdas", 0, to={"func": 1}),
        "'func' is not known",
    ),
    Case(
        "another container",
        SCHEDULE,
        saved(lambda: OrderedDict(scheduler=[], scaler={})),
        "scheduler is [], not an object",
    ),
    Case(
        "a generator of other size", RANDOM, in_state("torch", to=lambda t: t[:100]), "torch is no"
    ),
    Case("a generator of floats", RANDOM, in_state("torch", to=lambda t: t.float()), "torch is no"),
    Case(
        "a place outside numpy's words", RANDOM, in_state("numpy", 2, to=10**6), "numpy is no state"
    ),
    Case(
        "another generator of numpy", RANDOM, in_state("numpy", 0, to="PCG64"), "numpy is no state"
    ),
    Case("words of 40 bits", RANDOM, in_state("python", 1, 0, to=2**40), "python is no state"),
    Case(
        "a place outside Python's words",
        RANDOM,
        in_state("python", 1, 624, to=2**31),
        "python is no state",
    ),
    Case("devices that are a number", RANDOM, in_state("cuda", to=5), "cuda is 5"),
]

ROW = b'{"question": "a", "answer": "b"}\n'
DATA = [
    Case("a pipe", "rows.jsonl", pipe, "pipe"),
    Case("a device", "rows.jsonl", link("/dev/zero"), "device"),
    Case("forty gibibytes of holes", "rows.jsonl", sparse(40 * GIB), "has holes"),
    Case("machine code", "rows.jsonl", content(bytes(range(128, 256)) * 100), "not UTF-8"),
    Case("nested without end", "rows.jsonl", content(DEEP), "not JSON"),
    Case("a key twice", "rows.jsonl", content(ROW[:-2] + b', "answer": "c"}'), "stands twice"),
    Case("5,000 digits", "rows.jsonl", content(b'{"question": ' + b"9" * 5000 + b"}"), "not JSON"),
    Case("half a pair", "rows.jsonl", content(rb'{"question": "\ud800", "answer": "b"}'), "half a"),
    Case("an array nested without end", "rows.json", content(b"[" + DEEP), "not JSON"),
    Case("an array with a key twice", "rows.json", content(b'[{"a": 1, "a": 2}]'), "stands twice"),
    Case(
        "a vast array", "rows.json", lambda f: (f.write_bytes(b"["), os.truncate(f, GIB)), "holes"
    ),
    Case("no parquet", "rows.parquet", content(b"PAR1" + b"\xff" * 400 + b"PAR1"), "parquet"),
    Case("parquet in a pipe", "rows.parquet", pipe, "pipe"),
    Case("a text for 5,000 rows", "rows.parquet", parquet("a" * 2**20, 5000), "expands to"),
    Case("a text 5,000 times a row", "rows.parquet", parquet("a" * 2**20, 5000, 1), "expands to"),
    Case("a text of zeros", "rows.parquet", parquet("0" * 2**27, 1), "expands to"),
    Case("five million rows of nothing", "rows.parquet", parquet(None, 5 * 10**6), "expands to"),
]

LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12)
)
CONFIGS = [
    Case("a billion laughs", "run.yaml", content(LAUGHS.encode()), "aliases stand for"),
    Case("a billion merges", "run.yaml", content(MERGES.encode()), "aliases stand for"),
    Case("a list of itself", "run.yaml", content(b"train: &a [*a]"), "alias of itself"),
    Case("a call", "run.yaml", content(b"name: !!python/object/apply:os.system ['ls']"), "python"),
    Case("a key twice", "run.yaml", content(b"train: {}\ntrain: {}"), "duplicate key train"),
    Case("a mebibyte", "run.yaml", sparse(1 << 20), "may have 131,072"),
    Case("nested without end", "run.yaml", content(b"[" * 5000), "brackets in one another"),
    Case("deep blocks", "run.yaml", content(b"- " * 5000), "in one another"),
    Case("5,000 digits", "run.yaml", content(b"train: {seed: " + b"9" * 5000 + b"}"), "limit"),
    Case("a date that is none", "run.yaml", content(b"name: 2001-99-99"), "month"),
    Case("no UTF-8", "run.yaml", content(b"name: \xff"), "UTF-8"),
    Case("a pipe", "run.yaml", pipe, "pipe"),
    Case("a vast rank", "run.yaml", content(b"moe: {r: 1000000000}"), "moe.r is 1000000000"),
    Case("a rate without end", "run.yaml", content(b"moe: {lora_alpha: .inf}"), "moe.lora_alpha"),
]
ALL = [*ADAPTER, *CHECKPOINT, *MANIFESTS, *RUN, *DATA, *CONFIGS]
