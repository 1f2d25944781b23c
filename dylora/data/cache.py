"""Sets as they were tokenised, kept in the folder of `data.cache`, a file for each.

The name of a file is a hash of all that its content depends on: the files' bytes, the settings of
the source and of the data, the template, the tokenizer, and the versions of the code. So a file is
right or is not found, and nothing has to be deleted for safety.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.data.readers import find_files
from dylora.data.record import RowCounts
from dylora.data.splits import content_hash
from dylora.data.streamed import TrainingSet
from dylora.data.tokenize import SetReport, SplitReport, TokenizedSet
from dylora.data_config import DataConfig, SourceConfig
from dylora.storage.manifest import hash_file

CACHE_VERSION = 2  # of the layout, and of what rows become
COMMIT = re.compile(r"[0-9a-f]{40}")  # of the hub, at which a set never changes


class LoadedSource(NamedTuple):
    """One source, ready for training."""

    train: TrainingSet
    validation: TokenizedSet
    report: SetReport
    provenance: dict[str, Any]  # JSON types


def cached_source(
    source: SourceConfig,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    decides: tuple[int | float | None, ...],
    load: Callable[[], LoadedSource],
) -> LoadedSource:
    """What `load` gives, from the cache where it is there, else into it.

    decides: what else decides which rows are taken.

    Kept are sets of files, and of the hub at a commit. Raises ValueError where the folder cannot be
    written.
    """
    data = None if config.cache is None else _data_of(source)
    if data is None or config.cache is None:
        return load()
    depends = {
        "source": {key: value for key, value in asdict(source).items() if key != "weight"},
        "data": {key: getattr(config, key) for key in ("max_length", "over_long", "seed")},
        "train_on_inputs": config.train_on_inputs,
        "subsets": decides,
        "template": template,
        "tokenizer": _tokenizer_hash(tokenizer),
        "versions": [CACHE_VERSION, *map(_version, ("dylora", "transformers", "tokenizers"))],
    }
    folder = Path(config.cache).expanduser()
    key = content_hash(json.dumps(depends, sort_keys=True), *data)
    file = folder / f"{key}.safetensors"
    found = _read(file, source.name)
    if found is not None:
        return found
    loaded = load()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(file, loaded)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"data.cache: {file} cannot be written: {why}") from error
    return loaded


def _data_of(source: SourceConfig) -> list[str] | None:
    """Hashes of the data that a source reads; None where they are not known beforehand, or the rows
    are generated."""
    if source.name.startswith("skill/"):
        return None
    on_hub = source.path is None or find_files(source.path) is None
    if on_hub and not COMMIT.fullmatch(source.revision or ""):
        return None
    hashes: list[str] = []
    for path in filter(None, (source.path, source.validation_path)):
        for file in find_files(path) or []:
            parts = sorted(file.rglob("*")) if file.is_dir() else [file]
            for part in filter(Path.is_file, parts):
                hashes += [str(part), hash_file(part)]
    return hashes


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of everything that decides which ids a text has."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    core = tokenizer.get_vocab() if backend is None else backend.to_str()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return content_hash(json.dumps([type(tokenizer).__name__, core, special], sort_keys=True))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of a checkout"


def _write(file: Path, loaded: LoadedSource) -> None:
    report = loaded.report
    assert isinstance(loaded.train, TokenizedSet)  # what is streamed is not kept
    record = {
        "counts": report.counts._asdict(),
        "splits": {name: one._asdict() for name, one in report.splits.items()},
        "provenance": loaded.provenance,
        "sha256": [_digest(one) for one in (loaded.train, loaded.validation)],
    }
    tensors: dict[str, Tensor] = {
        "record": torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8)
    }
    for examples in (loaded.train, loaded.validation):
        ids, ends = examples.arrays
        tensors |= {f"{examples.split}.ids": ids, f"{examples.split}.ends": ends}
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _read(file: Path, name: str) -> LoadedSource | None:
    """None where there is no such file, or it is damaged."""
    try:
        tensors = load_file(file)
        record = json.loads(bytes(tensors["record"].tolist()))
        sets = [
            TokenizedSet.of_arrays(name, split, tensors[f"{split}.ids"], tensors[f"{split}.ends"])
            for split in ("train", "validation")
        ]
        if record["sha256"] != [_digest(one) for one in sets]:
            return None
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
    counts = RowCounts(**record["counts"] | {"problems": tuple(record["counts"]["problems"])})
    splits = {
        split: SplitReport(**values | {"problems": tuple(values["problems"])})
        for split, values in record["splits"].items()
    }
    report = SetReport(name, counts, splits, cached=True)
    return LoadedSource(sets[0], sets[1], report, record["provenance"])


def _digest(examples: TokenizedSet) -> str:
    digest = hashlib.sha256()
    for part in examples.arrays:
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()
