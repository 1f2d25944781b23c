"""Question: how good a code model fits into 12 MB and an hour of two CPU cores?

Method: a Llama of 5 M parameters on the standard library's source (corpus.py), Muon for the
matrices and AdamW for the rest, a warmup-stable-decay schedule counted in tokens.
Result: dylora/assets/tiny-code-llama/README.md, which card.py writes from training.json.

    python experiments/tiny_base/pretrain.py --bf16

An interrupted run continues from its last snapshot under --work.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
from corpus import is_held_out, read_documents, train_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEQUENCE = 512
LOG_EVERY, SNAPSHOT_EVERY = 20, 200


def learning_rate_factor(done: float) -> float:
    """Warm up over 2 % of the tokens, hold, fall linearly to 2 % over the last 35 %."""
    if done < 0.02:
        return done / 0.02
    return min(1.0, 0.02 + 0.98 * (1 - done) / 0.35)


def sequence_length(done: float) -> int:
    """Short windows while the rate is high, long ones while it falls: attention costs 40 %."""
    return SEQUENCE // 2 if done < 0.65 else SEQUENCE


def build_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def tokenize(tokenizer, documents: dict[str, str], held_out: bool) -> torch.Tensor:
    """One long stream: <s> text </s> <s> text </s> …"""
    texts = [text for name, text in documents.items() if is_held_out(name) == held_out]
    ids = [token for encoded in tokenizer.encode_batch(texts) for token in [*encoded.ids, 2]]
    return torch.tensor(ids, dtype=torch.int16)


@torch.no_grad()
def bits_per_byte(model, stream: torch.Tensor, total_bytes: int) -> float:
    """Summed next-token cross-entropy over non-overlapping windows, in bits per UTF-8 byte."""
    model.eval()
    nats = 0.0
    windows = stream[: len(stream) // SEQUENCE * SEQUENCE].long().view(-1, SEQUENCE)
    for ids in windows.split(16):
        logits = model(input_ids=ids).logits[:, :-1].float()
        nats += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        ).item()
    model.train()
    counted_bytes = total_bytes * windows.numel() / len(stream)
    return nats / math.log(2) / counted_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=13_000_000)
    parser.add_argument("--batch_sequences", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="AdamW's; Muon's is 0.02")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_base"))
    parser.add_argument("--out", type=Path, default=Path("dylora/assets/tiny-code-llama"))
    parser.add_argument("--bf16", action="store_true", help="autocast the forward pass to bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bench_steps", type=int, default=0, help="stop after this many steps")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    documents = read_documents()
    tokenizer = train_tokenizer([text for name, text in documents.items() if not is_held_out(name)])
    train_stream = tokenize(tokenizer, documents, held_out=False)
    val_stream = tokenize(tokenizer, documents, held_out=True)
    val_bytes = sum(len(text.encode()) for name, text in documents.items() if is_held_out(name))

    model = build_model(args.seed)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [0.02, args.learning_rate]
    forward = torch.compile(model) if args.compile else model

    tokens_per_step = args.batch_sequences * SEQUENCE
    steps = args.tokens // tokens_per_step
    # One offset per window, reshuffled and shifted each epoch: windows never repeat exactly.
    windows_per_epoch = len(train_stream) // SEQUENCE - 1
    snapshot, log = args.work / "snapshot.pt", args.work / "log.jsonl"
    start, seconds_before = 0, 0.0
    if snapshot.exists():
        state = torch.load(snapshot, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start, seconds_before = state["step"], state["seconds"]
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{len(train_stream) / 1e6:.2f} M tokens an epoch, {steps} steps",
        flush=True,
    )

    def windows(step: int) -> torch.Tensor:
        ids = []
        for index in range(step * args.batch_sequences, (step + 1) * args.batch_sequences):
            epoch, position = divmod(index, windows_per_epoch)
            generator = torch.Generator().manual_seed(args.seed * 1000 + epoch)
            shift = int(torch.randint(SEQUENCE, (1,), generator=generator))
            order = torch.randperm(windows_per_epoch, generator=generator)
            begin = int(order[position]) * SEQUENCE + shift
            ids.append(train_stream[begin : begin + SEQUENCE])
        return torch.stack(ids).long()

    clock, running = time.perf_counter(), []
    for step in range(start, steps):
        for optimizer, rate in zip(optimizers, base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate_factor((step + 1) / steps)
        ids = windows(step).view(-1, sequence_length(step / steps))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bf16):
            logits = forward(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running.append(loss.item())
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            seconds = seconds_before + time.perf_counter() - clock
            row = {
                "step": step + 1,
                "tokens": (step + 1) * tokens_per_step,
                "loss": sum(running) / len(running),
                "seconds": round(seconds),
            }
            running.clear()
            if (step + 1) % SNAPSHOT_EVERY == 0 or step + 1 == steps:
                row["val_bits_per_byte"] = bits_per_byte(model, val_stream, val_bytes)
                torch.save(
                    {
                        "model": model.state_dict(),
                        "step": step + 1,
                        "seconds": seconds,
                        "optimizers": [o.state_dict() for o in optimizers],
                    },
                    snapshot,
                )
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
        if args.bench_steps and step + 1 >= args.bench_steps:
            return

    args.out.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.out)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(args.out)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    reloaded = LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    (args.out / "training.json").write_text(
        json.dumps(
            {
                "files": len(documents),
                "train_tokens_per_epoch": len(train_stream),
                "tokens_seen": steps * tokens_per_step,
                "steps": steps,
                "held_out_files": sum(map(is_held_out, documents)),
                "held_out_bytes": val_bytes,
                "held_out_bits_per_byte_of_the_stored_half_precision_model": bits_per_byte(
                    reloaded, val_stream, val_bytes
                ),
                "seconds": rows[-1]["seconds"],
                "python": platform.python_version(),
                "torch": torch.__version__,
                "curve": [row for row in rows if "val_bits_per_byte" in row],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
