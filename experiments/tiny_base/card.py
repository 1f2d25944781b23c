"""Write the model card of the embedded base from what its training recorded.

python experiments/tiny_base/card.py --folder dylora/assets/tiny-code-llama
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# None ends in white space: a line break and the indentation after it are one token.
PROMPTS = (
    "def read_lines(path):",
    "class Stack:\n    def __init__(self",
    "class TestAdd(unittest.TestCase):",
    "    for index, value in enumerate(",
)
TEMPLATE = Path(__file__).with_name("card_template.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("dylora/assets/tiny-code-llama"))
    parser.add_argument("--note", default="", help="a sentence for the card")
    args = parser.parse_args()
    record = json.loads((args.folder / "training.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.folder)

    samples = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        mask = torch.ones_like(ids)
        torch.manual_seed(0)
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=64, do_sample=True, temperature=0.6
        )
        continuation = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        samples.append(f"```python\n{prompt}▸{continuation.rstrip()}\n```")
    curve = "\n".join(
        f"| {row['tokens']:,} | {row['loss']:.3f} | {row['val_bits_per_byte']:.4f} |"
        for row in record["curve"]
    )
    files = [path for path in args.folder.iterdir() if path.suffix in (".safetensors", ".json")]
    card = TEMPLATE.read_text().format(
        parameters=model.num_parameters() / 1e6,
        megabytes=sum(path.stat().st_size for path in files) / 1e6,
        epochs=record["tokens_seen"] / record["train_tokens_per_epoch"],
        hours=record["seconds"] / 3600,
        bits=record["held_out_bits_per_byte_of_the_stored_half_precision_model"],
        curve=curve,
        samples="\n\n".join(samples),
        note=f"{args.note}\n" if args.note else "",
        **{key: value for key, value in record.items() if key not in ("curve", "seconds")},
    )
    (args.folder / "README.md").write_text(card)


if __name__ == "__main__":
    main()
