"""`model.base` is an ordinary transformers model: what others built for those works on it."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dylora import DyLoRA_MoE, MoELoraConfig, SkillLibrary
from dylora.base_models import load_base, load_tokenizer

EMBEDDED = "tiny-code-llama"
NEW = 8  # tokens that a generation adds


def parameters_of(model: DyLoRA_MoE) -> list[nn.Parameter]:
    """Experts and routers."""
    return [p for _, p in [*model.named_expert_parameters(), *model.router_parameters()]]


# Generation. Each way is compared with a loop of full passes or with the dynamic cache.


def generate(model: DyLoRA_MoE, ids: Tensor, **options) -> Tensor:
    """transformers' own generate, NEW tokens whatever they are."""
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    return model.base.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, **options
    )


@torch.no_grad()
def next_logits(model: DyLoRA_MoE, ids: Tensor) -> Tensor:
    """[B, V] by a pass over everything so far, without a cache."""
    return model(ids).logits[:, -1]


def test_greedy_generation_takes_the_likeliest_token_of_the_full_pass(mixture, ids):
    model = mixture()
    expected = ids
    for _ in range(NEW):
        best = next_logits(model, expected).argmax(-1, keepdim=True)
        expected = torch.cat([expected, best], 1)
    assert torch.equal(generate(model, ids), expected)
    with model.disable_adapters():
        assert not torch.equal(generate(model, ids), expected)


def test_sampling_draws_from_the_distribution_of_the_full_pass(mixture, ids):
    model = mixture()
    torch.manual_seed(3)
    drawn = generate(model, ids, do_sample=True, temperature=0.7, top_k=0)
    torch.manual_seed(3)
    expected = ids
    for _ in range(NEW):
        p = (next_logits(model, expected) / 0.7).softmax(-1)
        expected = torch.cat([expected, torch.multinomial(p, 1)], 1)
    assert torch.equal(drawn, expected)
    assert not torch.equal(drawn, generate(model, ids))


def test_beam_search_finds_what_an_exhaustive_beam_finds(mixture, ids):
    model, beams = mixture(), 3
    for prompt in ids:
        kept, scores = prompt[None], torch.zeros(1)
        for _ in range(NEW):
            logp = next_logits(model, kept).log_softmax(-1)  # [beams, V]
            scores, flat = (scores[:, None] + logp).flatten().topk(beams)
            kept = torch.cat([kept[flat // logp.shape[1]], flat[:, None] % logp.shape[1]], 1)
        found = generate(model, prompt[None], num_beams=beams)
        assert torch.equal(found[0], kept[0])


@pytest.mark.parametrize("beams", [1, 3])
def test_a_static_cache_generates_what_the_dynamic_one_does(mixture, ids, beams):
    model = mixture()
    static = generate(model, ids, num_beams=beams, cache_implementation="static")
    assert torch.equal(static, generate(model, ids, num_beams=beams))


# torch.compile


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("mode", ["dense", "maturity"])
def test_the_compiled_base_has_the_logits_and_gradients_of_the_eager_one(llama, mixture, ids, mode):
    model = mixture(llama(num_hidden_layers=1), routing_mode=mode)

    def logits_and_gradients(base) -> list[Tensor]:
        logits = base(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
        return [logits, *torch.autograd.grad(loss, parameters_of(model))]

    eager = logits_and_gradients(model.base)
    torch.compiler.reset()
    with torch._inductor.config.patch({"compile_threads": 1}):
        compiled = logits_and_gradients(torch.compile(model.base, fullgraph=True))
    assert all(tensor.abs().max() > 1e-3 for tensor in eager)
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# lm-evaluation-harness

CHOICES = """
task: local_choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
ANSWERS = """
task: local_answers
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{written}}"
generation_kwargs: {do_sample: false, max_gen_toks: 6, until: ["never in an answer"]}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(params=["site", "prompt"])
def embedded(request) -> DyLoRA_MoE:
    """Random experts on the embedded base; routed by prompts, each serves one kind of line."""
    config = MoELoraConfig(num_experts=3, r=4, router_scope=request.param)
    model = DyLoRA_MoE.from_base(load_base(EMBEDDED), config)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in parameters_of(model):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    if request.param == "prompt":
        library, encode = SkillLibrary(model), load_tokenizer(EMBEDDED)
        kinds = ("import return class", "while lambda", "raise print yield")
        for expert, words in enumerate(kinds):
            texts = [
                f"def f{number}(x):\n    {word}{end}"
                for number in range(20)
                for word in words.split()
                for end in ("", " x", " y")
            ]
            rows = encode(texts)["input_ids"]
            library.add(f"skill {expert}", rows[::2], rows[1::2], expert=expert)
    return model


@torch.no_grad()
def log_likelihood(model: DyLoRA_MoE, tokenizer, context: str, continuation: str) -> float:
    """log p(continuation | context), one pass for it alone."""
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + continuation)["input_ids"]])
    log_p = model(ids[:, :-1]).logits[0].log_softmax(-1)
    chosen = log_p.gather(1, ids[0, 1:, None])[:, 0]
    return float(chosen[start - 1 :].sum())


def test_the_harness_scores_a_local_task_as_a_loop_by_hand(embedded, tmp_path: Path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'dylora[eval]'")
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = load_tokenizer(EMBEDDED)
    names = ["import", "return", "class", "while", "lambda", "raise", "print", "yield"]
    rows = [
        {
            "question": f"def f{index}(x):\n    {names[index]}",
            "choices": [names[(index + step) % 8] + " x" for step in (1, 2, 4)],
            "answer": index % 3,
        }
        for index in range(8)
    ]
    for row in rows[:4]:  # answers that are right, and others that are not
        ids = torch.tensor([tokenizer(row["question"])["input_ids"]])
        output = embedded.base.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
        )
        row["written"] = tokenizer.decode(output[0, ids.shape[1] :])
    for row in rows[4:]:
        row["written"] = "something else"
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choices", CHOICES), ("answers", ANSWERS)):
        text = text.replace("DATA", str(data)).replace("CACHE", str(tmp_path / "cache"))
        (tmp_path / f"{name}.yaml").write_text(text)

    harness = HFLM(pretrained=embedded.base, tokenizer=tokenizer, batch_size=3)
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    tasks = tasks.load(["local_choices", "local_answers"])
    results = evaluate(harness, tasks, bootstrap_iters=0)

    right = 0
    samples = {sample["doc_id"]: sample for sample in results["samples"]["local_choices"]}
    for index, row in enumerate(rows):
        ours = [
            log_likelihood(embedded, tokenizer, row["question"], " " + choice)
            for choice in row["choices"]
        ]
        theirs = [float(score) for score, _ in samples[index]["filtered_resps"]]
        torch.testing.assert_close(torch.tensor(theirs), torch.tensor(ours), rtol=1e-4, atol=1e-3)
        with embedded.disable_adapters():
            alone = log_likelihood(embedded, tokenizer, row["question"], " " + row["choices"][0])
        assert abs(alone - ours[0]) > 0.01  # the harness has seen the experts
        right += ours.index(max(ours)) == row["answer"]
    assert 0 < right < 8
    assert results["results"]["local_choices"]["acc,none"] == right / 8
    assert results["results"]["local_answers"]["exact_match,none"] == 0.5
