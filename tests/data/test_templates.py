"""Conversations become the ids of apply_chat_template, and answers alone are trained on."""

import json
import re

import pytest
from tokenizers import AddedToken

from dylora.config import MoELoraConfig
from dylora.data.prepare import load_data
from dylora.data.prompts import encode_answers, encode_prompts, format_prompt
from dylora.data.record import BadRecord
from dylora.data.templates import (
    Chat,
    JinjaTemplate,
    TextTemplate,
    load_template,
    question,
    recorded_template,
)
from dylora.data_config import DataConfig, SourceConfig
from dylora.run_config import RunConfig
from run_fixtures import build_tokenizer

EOS = 2
# In the manner of Qwen, with tools; of Llama 3, whose headings end in two newlines; of Mistral,
# whose answers end in EOS and begin with a space.
QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' %}{% generation %}{{- m.content }}"
    "{%- if m.tool_calls %}{{- m.tool_calls | tojson }}{%- endif %}{{- '<|im_end|>' }}"
    "{% endgeneration %}{%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}{{- '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|head|>' + m.role + '<|/head|>\\n\\n' }}"
    "{%- if m.role == 'assistant' %}{% generation %}{{- m.content | trim + '<|eot|>' }}"
    "{% endgeneration %}{%- else %}{{- m.content | trim + '<|eot|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\\n\\n' }}{%- endif %}"
)
MISTRAL = (
    "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'assistant' %}{% generation %}"
    "{{- ' ' + m.content + eos_token }}{% endgeneration %}"
    "{%- elif m.role == 'user' %}{{- '[INST] ' + m.content + ' [/INST]' }}"
    "{%- else %}{{ raise_exception('only user and assistant') }}{%- endif %}{%- endfor %}"
)
TEMPLATES = {"qwen": QWEN, "llama": LLAMA, "mistral": MISTRAL}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Add 3 and 5."},
    {"role": "assistant", "content": "  8\n"},
    {"role": "user", "content": "def add(a, b)?"},
    {"role": "assistant", "content": "\n\n    return a + b"},
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALLS = [
    {"role": "user", "content": "Add."},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]},
    {"role": "tool", "content": "8"},
    {"role": "assistant", "content": "It is 8."},
]


def chat_tokenizer(**options):
    tokenizer = build_tokenizer(**options)
    names = ("<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>")
    tokenizer.add_tokens([AddedToken(name, special=True) for name in names])
    return tokenizer


@pytest.fixture(scope="module")
def chat_tokens():
    return chat_tokenizer()


def unmarked(text: str) -> str:
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", text)


def flat(parts) -> tuple[list[int], list[int]]:
    """Ids, and 1 on those that are trained on."""
    assert not isinstance(parts, BadRecord), parts
    trained = [number % 2 for number, part in enumerate(parts) for _ in part]
    return [token for part in parts for token in part], trained


def chats(name: str) -> list[Chat]:
    found = [Chat(TURNS), Chat(TURNS[:2]), Chat(TURNS[:3])]
    found += [Chat([SYSTEM, *TURNS])] if name != "mistral" else []
    return found + ([Chat([SYSTEM, *CALLS], [TOOL])] if name == "qwen" else [])


# The ids of transformers


@pytest.mark.parametrize("name", TEMPLATES)
def test_marked_answers_are_those_of_apply_chat_template_token_by_token(name, chat_tokens):
    template = JinjaTemplate(chat_tokens, TEMPLATES[name], name)
    for chat, parts in zip(chats(name), template.examples(chats(name)), strict=True):
        theirs = chat_tokens.apply_chat_template(
            chat.messages,
            chat.tools,
            chat_template=TEMPLATES[name],
            return_assistant_tokens_mask=True,
        )
        assert flat(parts) == (theirs["input_ids"], theirs["assistant_masks"])


@pytest.mark.parametrize("name", TEMPLATES)
def test_without_marks_the_same_tokens_are_found_by_what_each_answer_adds(name, chat_tokens):
    marked = JinjaTemplate(chat_tokens, TEMPLATES[name], name)
    plain = JinjaTemplate(chat_tokens, unmarked(TEMPLATES[name]), name)
    assert marked.has_marks
    assert not plain.has_marks
    for one, other in zip(marked.examples(chats(name)), plain.examples(chats(name)), strict=True):
        assert flat(one) == flat(other)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("marks", [True, False])
def test_what_generation_is_given_is_what_stood_before_the_answer_in_training(
    name, marks, chat_tokens
):
    text = TEMPLATES[name] if marks else unmarked(TEMPLATES[name])
    template = JinjaTemplate(chat_tokens, text, name)
    answered = Chat([*TURNS[:3], {"role": "assistant", "content": "return a + b"}])
    ids, trained = flat(template.examples([answered])[0])
    last = len(ids) - trained[::-1].index(1) - sum(trained[-len(ids) :])  # not before the first
    [prompt] = template.prompts([Chat(TURNS[:3])])
    assert ids[: len(prompt)] == prompt
    assert trained[len(prompt)] == 1
    assert trained[len(prompt) - 1] == 0
    assert last < len(prompt)


def test_a_template_that_heads_no_answer_is_not_taken(chat_tokens):
    """Training and generation could not be told to agree."""
    with pytest.raises(ValueError, match="does nothing for add_generation_prompt"):
        JinjaTemplate(chat_tokens, QWEN.partition("{%- if add_gen")[0], "headless")


# The text templates


def test_alpaca_gives_the_ids_that_it_always_gave(chat_tokens, spaced_tokenizer):
    for one in (chat_tokens, spaced_tokenizer):
        template = TextTemplate(one, "alpaca")
        asked = question(template, "Use <s>", "3, 5")
        answers = ["def add", "\n\n  late", "</s>"]
        made = template.examples(
            [Chat([*asked.messages, {"role": "assistant", "content": a}]) for a in answers]
        )
        [prompt] = encode_prompts(one, [format_prompt("Use <s>", "3, 5")])
        assert template.prompts([asked]) == [prompt]
        for parts, ids in zip(made, encode_answers(one, answers), strict=True):
            assert parts == [prompt, [*ids, EOS]]


def test_several_turns_in_words_are_each_ended_by_eos(chat_tokens):
    for name, expected in {
        "alpaca": "Be brief.\n\n### Instruction:\nAdd 3 and 5.\n\n### Response:\n",
        "plain": "Be brief.\n\nAdd 3 and 5.\n",
    }.items():
        template = TextTemplate(chat_tokens, name)
        [parts] = template.examples([Chat([SYSTEM, *TURNS])])
        texts = [chat_tokens.decode(part) for part in parts]
        assert texts[0] == f"<s>{expected}"
        assert texts[1] == "  8\n</s>"
        assert texts[2].endswith("def add(a, b)?" + expected.partition("5.")[2])
        assert texts[3] == "\n\n    return a + b</s>"
        [prompt] = template.prompts([Chat([SYSTEM, *TURNS[:3]])])
        assert prompt == [token for part in parts[:3] for token in part]


def test_chatml_is_made_for_the_tokenizer(chat_tokens):
    template = load_template("chatml", chat_tokens)
    [parts] = template.examples([Chat(TURNS)])
    ids, _ = flat(parts)
    assert chat_tokens.decode(ids).startswith(
        "<s><|im_start|>user\nAdd 3 and 5.<|im_end|>\n<|im_st"
    )
    answers = [chat_tokens.decode(part) for part in parts[1::2]]
    assert answers == ["  8\n<|im_end|>", "\n\n    return a + b<|im_end|>"]
    assert len(template.end_ids) == 2
    plain = load_template("chatml", build_tokenizer())  # it has no such tokens
    [parts] = plain.examples([Chat(TURNS)])
    assert [part[-1] for part in parts[1::2]] == [EOS, EOS]
    assert plain.end_ids == [EOS]


# What is refused


@pytest.mark.parametrize(
    ("chat", "name", "why"),
    [
        (Chat(CALLS[:2]), "alpaca", "no place for tools"),
        (Chat(TURNS, [TOOL]), "plain", "no place for tools"),
        (Chat(TURNS, [TOOL]), "chatml", "no place for tools"),
        (Chat(CALLS), "chatml", "no place for tool_calls"),
    ],
)
def test_a_template_that_has_no_place_for_tools_drops_none(chat, name, why, chat_tokens):
    [found] = load_template(name, chat_tokens).examples([chat])
    assert isinstance(found, BadRecord)
    assert why in str(found)


def test_a_template_that_rewrites_earlier_turns_needs_marks(chat_tokens):
    rewriting = unmarked(QWEN).replace("m.content }}", "(m.content if loop.last else '…') }}")
    template = JinjaTemplate(chat_tokens, rewriting, "t")
    one, other = template.examples([Chat(TURNS[:2]), Chat(TURNS)])
    assert not isinstance(one, BadRecord)
    assert "writes message 2 otherwise" in str(other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for", "cannot render it"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot render it"),
        ("{{ messages.append(1) }}", "cannot render it"),
        (QWEN.replace("<|im_end|>", "<|end|>"), r"ends an answer with '<\|end\|>\\n', which is no"),
        (
            QWEN.replace("{{- '<|im_end|>' }}{% endgen", "{% endgen").replace(
                "endgeneration %}", "endgeneration %}{{- '<|im_end|>' }}"
            ),
            "does not train on",
        ),
    ],
)
def test_a_template_that_could_not_serve_is_one_clear_error(text, message, chat_tokens):
    with pytest.raises(ValueError, match=message):
        JinjaTemplate(chat_tokens, text, "t")


def test_names_of_templates_are_checked(chat_tokens, tmp_path):
    with pytest.raises(ValueError, match=r"has no chat template: set data\.template"):
        load_template("base", chat_tokens)
    with pytest.raises(ValueError, match=r"'chatlm', neither a name nor .*did you mean 'chatml'"):
        load_template("chatlm", chat_tokens)
    with pytest.raises(FileNotFoundError, match=r"none\.jinja does not exist"):
        load_template(str(tmp_path / "none.jinja"), chat_tokens)
    (tmp_path / "big.jinja").write_bytes(b" " * (300 << 10))
    with pytest.raises(ValueError, match="may have 262,144"):
        load_template(str(tmp_path / "big.jinja"), chat_tokens)
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = {"default": QWEN, "rag": "x"}
    assert load_template("base", tokenizer).text == QWEN


# Rows


def data_of(tmp_path, chat_tokens, rows, template="alpaca", **settings):
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = SourceConfig(name="own", path=str(tmp_path / "r.jsonl"), split="50/50")
    config = DataConfig(sources=[source], template=template, **settings)
    return load_data(config, chat_tokens)


def all_of(data):
    return [one[i] for one in (*data.train, *data.validation) for i in range(len(one))]


def test_messages_and_sharegpt_give_the_same_examples(tmp_path, chat_tokens):
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    rows = [[SYSTEM, {"role": "user", "content": f"{n}?"}, *TURNS[1:]] for n in range(6)]
    shared = [
        {
            "conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row[1:]],
            "system": row[0]["content"],
        }
        for row in rows
    ]
    found = [
        all_of(data_of(tmp_path, chat_tokens, made, "chatml"))
        for made in ([{"messages": row} for row in rows], shared)
    ]
    assert found[0] == found[1]
    answers = [i for i in found[0][0]["labels"] if i != -100]
    assert chat_tokens.decode(answers) == "  8\n<|im_end|>\n\n    return a + b<|im_end|>"


def test_chats_that_cannot_be_used_are_told_with_file_and_line(tmp_path, chat_tokens):
    good = [{"messages": [{"role": "user", "content": f"{n}?"}, TURNS[1]]} for n in range(6)]
    bad = [
        ({"messages": "x"}, "is 'x', not a list of messages"),
        ({"messages": [{"role": "asistant", "content": "a"}]}, "did you mean 'assistant'"),
        ({"messages": [TURNS[0]]}, "no message is the assistant's"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts that are no"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": " "}]}, "message 2 is empty"),
        ({"messages": [3]}, "message 1 is of type int"),
        ({"messages": [{"role": "user", "content": [{"type": []}]}]}, "parts that are no"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}, "parts that"),
        ({"messages": [{"role": "user", "content": 7}, TURNS[1]]}, "message 1 is of type int"),
    ]
    data = data_of(tmp_path, chat_tokens, [*good, *(row for row, _ in bad)], "chatml")
    problems = data.reports[0].counts.problems
    for number, (problem, (_, why)) in enumerate(zip(problems, bad, strict=True), 7):
        assert problem.startswith(f"{tmp_path / 'r.jsonl'}:{number}: ")
        assert why in problem


def test_a_message_in_both_spellings_is_the_one_that_was_checked(tmp_path, chat_tokens):
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"from": "gpt", "value": f"{n}"}]}
        for n in range(6)
    ]
    plain = data_of(tmp_path, chat_tokens, rows, "chatml")
    for row in rows:
        row["messages"][1] |= {"content": 7, "role": ["bot"]}
    both = data_of(tmp_path, chat_tokens, rows, "chatml")
    assert all_of(both) == all_of(plain)


def test_rows_that_the_template_refuses_are_counted_with_file_and_line(tmp_path, chat_tokens):
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, TURNS[1]]} for n in range(8)]
    rows += [{"messages": [*CALLS[:2]]}]
    data = data_of(tmp_path, chat_tokens, rows, "chatml")
    described = data.reports[0].describe()
    assert "1 refused" in described
    assert f"{tmp_path / 'r.jsonl'}:9: the template chatml has no place for tool_calls" in described


@pytest.mark.parametrize("template", ["alpaca", "plain", "chatml"])
def test_a_row_that_begins_with_an_answer_is_refused_where_prompts_route(
    template, tmp_path, chat_tokens
):
    begins = {"from": "gpt", "value": "Hello."}
    rows = [
        {"conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": f"{n}"}]}
        for n in range(8)
    ]
    rows[4]["conversations"].insert(0, begins)
    data_of(tmp_path, chat_tokens, rows, template)
    source = SourceConfig(name="own", path=str(tmp_path / "r.jsonl"), split="50/50")
    config = DataConfig(sources=[source], template=template, cache=str(tmp_path / "cache"))
    assert len(all_of(load_data(config, chat_tokens))) == 8
    data = load_data(config, chat_tokens, needs_prompt=True)
    assert [row["labels"][1] for row in all_of(data)] == [-100] * 7
    described = data.reports[0].describe()
    assert "1 refused" in described
    assert f"{tmp_path / 'r.jsonl'}:5: nothing comes before its first answer" in described


def test_train_on_inputs_trains_on_everything(tmp_path, chat_tokens):
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, TURNS[1]]} for n in range(8)]
    answers = data_of(tmp_path, chat_tokens, rows, "chatml").train[0]
    whole = data_of(tmp_path, chat_tokens, rows, "chatml", train_on_inputs=True)
    assert whole.train[0][0]["labels"] == whole.train[0][0]["input_ids"]
    assert whole.train[0][0]["input_ids"] == answers[0]["input_ids"]
    assert whole.train[0].target_tokens == answers.tokens
    assert whole.provenance["train_on_inputs"] is True


def test_a_long_chat_is_cut_or_dropped_whole(tmp_path, chat_tokens):
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, *TURNS[1:]]} for n in range(8)]
    whole = data_of(tmp_path, chat_tokens, rows, "chatml").train[0]
    length = whole.length(0)
    cut = data_of(
        tmp_path, chat_tokens, rows, "chatml", max_length=length - 3, over_long="truncate"
    )
    assert cut.train[0][0]["input_ids"] == whole[0]["input_ids"][: length - 3]
    assert cut.train[0][0]["labels"] == whole[0]["labels"][: length - 3]
    assert cut.reports[0].splits["train"].truncated == 4
    with pytest.raises(ValueError, match=rf"r\.jsonl:\d: {length} tokens, and max_length is"):
        data_of(tmp_path, chat_tokens, rows, "chatml", max_length=length - 3)


def test_a_completion_continues_its_prompt_as_they_stand(tmp_path, chat_tokens):
    rows = [{"prompt": f"{n} def add(a,", "completion": " b):\n"} for n in range(8)]
    for example in all_of(data_of(tmp_path, chat_tokens, rows)):
        number = chat_tokens.decode(example["input_ids"])[3]
        assert example["input_ids"] == [
            *encode_prompts(chat_tokens, [f"{number} def add(a, b):\n"])[0],
            EOS,
        ]
        kept = [token for token in example["labels"] if token != -100]
        assert chat_tokens.decode(kept) == " b):\n</s>"


def test_texts_fill_whole_windows_one_after_the_other(tmp_path, chat_tokens):
    rows = [{"text": f"text {n} " + "word " * n} for n in range(12)]
    data = data_of(tmp_path, chat_tokens, rows, max_length=16)
    for examples in (*data.train, *data.validation):
        windows = [examples[index] for index in range(len(examples))]
        assert all(window["labels"] == window["input_ids"] for window in windows)
        assert {len(window["input_ids"]) for window in windows[:-1]} == {16}
        text = chat_tokens.decode([token for window in windows for token in window["input_ids"]])
        parts = [part.removeprefix("<s>") for part in text.split("</s>")[:-1]]
        assert len(parts) == 6
        assert set(parts) <= {row["text"] for row in rows}


# Recorded


def test_a_record_gives_back_the_template_of_the_latest_training(chat_tokens):
    for name in ("alpaca", "plain", "chatml"):
        template = load_template(name, chat_tokens)
        record = {"data": {"prompt": template.text}}
        for one in (record, {"settings": {}, "earlier": [{"data": {"prompt": QWEN}}, record]}):
            found = recorded_template(one, chat_tokens)
            assert (type(found), found.text) == (type(template), template.text)
            assert found.prompts([Chat(TURNS[:3])]) == template.prompts([Chat(TURNS[:3])])
    for empty in ({}, {"data": {}}, {"earlier": [{}]}):
        assert recorded_template(empty, chat_tokens).name == "alpaca"


def test_training_on_everything_leaves_no_prompt_to_route_by():
    data, moe = DataConfig(train_on_inputs=True), MoELoraConfig(router_scope="prompt")
    with pytest.raises(ValueError, match=r"data\.train_on_inputs is True, but must be false with"):
        RunConfig(data=data, moe=moe)
