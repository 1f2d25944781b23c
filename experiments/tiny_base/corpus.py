"""Question: what text can every machine with Python train a small code model on?

Answer: the source of its own standard library, docstrings and language reference included
(PSF licence). This file collects it, splits off whole files for validation, and trains the
byte-level BPE tokenizer.
"""

import hashlib
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 4096
HELD_OUT_SHARE = 0.02
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]
# Tables and fixtures rather than code: character maps, pickled opcodes, grammar fuzz inputs.
EXCLUDED_DIRECTORIES = {"encodings", "site-packages", "__pycache__", "data", "pydoc_data"}
LARGEST_FILE_BYTES = 250_000


def read_documents() -> dict[str, str]:
    """Path relative to the library -> text, in sorted order."""
    library = Path(sysconfig.get_path("stdlib"))
    documents = {}
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if EXCLUDED_DIRECTORIES & set(relative.parts) or path.stat().st_size > LARGEST_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if len(text) > 200 and "\x00" not in text and _looks_written(text):
            documents[str(relative)] = text
    topics = library / "pydoc_data" / "topics.py"
    if topics.exists():  # the language reference, as prose
        namespace: dict[str, dict[str, str]] = {}
        exec(topics.read_text(encoding="utf-8"), namespace)
        documents |= {f"topics/{name}": text for name, text in namespace["topics"].items()}
    return documents


def _looks_written(text: str) -> bool:
    letters = sum(character.isalpha() or character.isspace() for character in text)
    longest = max(map(len, text.splitlines()), default=0)
    return letters / len(text) > 0.6 and longest < 1000


def is_held_out(name: str) -> bool:
    """Whole files are held out, chosen by a hash of their name: stable across machines."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return digest / 2**32 < HELD_OUT_SHARE


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE that keeps digits apart, so that numbers are spelled."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A <s> $B", special_tokens=[bos]
            ),
        ]
    )
    return tokenizer
