"""A run on conversations: its checkpoint answers in the template that it was trained with."""

import dataclasses
import json
from pathlib import Path

import pytest
from tokenizers import AddedToken

from dylora import DyLoRA_MoE, load_tokenizer
from dylora.cli.main import main
from dylora.data.templates import Chat, load_template
from dylora.evaluation.passk.generation import prompt_ids
from dylora.evaluation.passk.skills import skill_problems
from dylora.evaluation.routing_texts import add_prompts
from dylora.run_config import SourceConfig
from dylora.serving.engine import Speaker
from dylora.training.loop import train
from run_fixtures import build_tokenizer

TEMPLATE = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|' + m.role + '|>' + m.content + '<|end|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory, llama) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = build_tokenizer()
    names = ("<|user|>", "<|assistant|>", "<|end|>")
    tokenizer.add_tokens([AddedToken(name, special=True) for name in names])
    llama(vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chat_config(make_config, base, tmp_path):
    """A run of two steps on chats, with a template of a file."""
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "x"}]}
        for n in range(20)
    ]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "t.jinja").write_text(TEMPLATE)

    def make(name: str = "a", template: str = str(tmp_path / "t.jinja"), **changes):
        config = make_config(name, max_steps=2, save_steps=1, **changes)
        source = SourceConfig(name="chats", path=str(tmp_path / "chats.jsonl"))
        data = dataclasses.replace(config.data, sources=[source], template=template)
        model = dataclasses.replace(config.model, base=str(base))
        return dataclasses.replace(config, data=data, model=model)

    return make


def test_a_checkpoint_answers_in_the_template_that_it_was_trained_with(
    chat_config, tmp_path, monkeypatch, capsys
):
    run = train(chat_config())
    file = tmp_path / "t.jinja"
    template = load_template(str(file), run.tokenizer)
    file.unlink()  # the checkpoint has it
    [asked] = template.prompts([Chat([{"role": "user", "content": "5?"}])])
    rows = [run.data.train[0][index] for index in range(len(run.data.train[0]))]
    trained = {tuple(row["input_ids"][: row["labels"].count(-100)]) for row in rows}
    prompts = [Chat([{"role": "user", "content": f"{n}?"}]) for n in range(20)]
    assert trained < set(map(tuple, template.prompts(prompts)))
    seen = []
    generate = DyLoRA_MoE.generate

    def watched(self, *args, **kwargs):
        seen.append(kwargs["input_ids"].tolist())
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(DyLoRA_MoE, "generate", watched)
    folder = str(run.folder / "checkpoint-2")
    assert main(["generate", "--checkpoint", folder, "--prompt", "5?"]) == 0
    assert seen == [[asked]]
    end = run.tokenizer.convert_tokens_to_ids("<|end|>")
    assert Speaker.open(folder).ends == {run.tokenizer.eos_token_id, end}
    # the benchmark's instructions likewise
    model = DyLoRA_MoE.from_pretrained(folder)
    problems = skill_problems("skills/sql", 1)
    tokenizer = load_tokenizer(str(chat_config().model.base))
    chat = Chat([{"role": "user", "content": problems[0].instruction}])
    assert prompt_ids(model, tokenizer, problems) == template.prompts([chat])
    # a page's own prompts
    texts = run.folder / "routing.json"
    add_prompts(run.folder, run.config, texts, ["5?"])
    assert seen.pop() == [asked]
    # and another one where it is asked for
    assert main(["generate", "--checkpoint", folder, "--prompt", "5?", "--template", "plain"]) == 0
    assert run.tokenizer.decode(seen[1][0]) == "<s>5?\n"
    assert main(["generate", "--checkpoint", folder, "--prompt", "5?", "--template", "x"]) == 2
    assert "data.template is 'x', neither a name" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_another_template(chat_config):
    run = train(chat_config())
    with pytest.raises(ValueError, match=r"was trained with data\.template"):
        train(chat_config(template="plain"), str(run.folder / "checkpoint-1"))
    Path(chat_config().data.template).write_text(TEMPLATE.replace("bos_token", "''"))
    with pytest.raises(ValueError, match=r"other rows|other sources"):
        train(chat_config(), str(run.folder / "checkpoint-1"))


def test_a_hostile_template_of_a_checkpoint_is_one_line(chat_config, capsys):
    from harm import in_json, seal

    run = train(chat_config())
    folder = run.folder / "checkpoint-2"
    for text, words in (
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot render it"),
        ("{%" * 200_000, "which is no template"),
        (7, "which is no template"),
    ):
        in_json("training", "data", "prompt", to=text)(folder / "config.json")
        seal(folder)
        assert main(["generate", "--checkpoint", str(folder), "--prompt", "a"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ")
        assert words in line


def test_plain_text_has_no_prompt_to_route_by(make_config, tmp_path):
    moe = {"router_scope": "prompt", "num_experts": 1, "lora_dropout": 0.0, "expert_dropout": 0.0}
    config = make_config(moe=moe)
    rows = [{"text": "a b c"}, {"text": "d e f"}]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = SourceConfig(name="book", path=str(tmp_path / "texts.jsonl"), split="50/50")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=[source]))
    with pytest.raises(ValueError, match="source 'book' is plain text, which has no prompt"):
        train(config)
