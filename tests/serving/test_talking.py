"""`dylora chat` and `dylora generate`, as a person and a script use them."""

import gzip
import io
import json
from types import MappingProxyType

import pytest
import torch
from transformers import AutoModelForCausalLM

from dylora import SkillLibrary
from dylora.cli.chat import experts_line, talk
from dylora.cli.generate import read_prompts
from dylora.cli.main import main
from dylora.data.templates import load_template
from dylora.serving.answering import Row, Sampling
from dylora.serving.engine import Speaker
from dylora.serving.suggestions import suggested_questions
from dylora.tasks import generate_tasks

SAMPLING = Sampling(max_new_tokens=6)


def answer_to(speaker, messages, sampling=SAMPLING) -> Row:
    row = Row(speaker.conversation(messages), sampling)
    speaker.answer([row])
    return row


@pytest.fixture
def say(speaker, monkeypatch, capsys):
    """Types lines into a conversation; what it shows."""

    def type_(*lines: str, sampling=SAMPLING, system=None, suggested=MappingProxyType({})):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        talk(speaker, sampling, system, suggested)
        return capsys.readouterr()

    return type_


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_conversation_goes_on_with_what_was_said(say, speaker):
    first = answer_to(speaker, [user("Add 1.")])
    answered = {"role": "assistant", "content": first.text}
    second = answer_to(speaker, [user("Add 1."), answered, user("And 2?")])
    assert say("Add 1.", "And 2?").out == f"{first.text}\n{second.text}\n"
    assert say("Add 1.", "/reset", "And 2?").out == (
        f"{first.text}\n{answer_to(speaker, [user('And 2?')]).text}\n"
    )


def test_a_system_text_stands_before_the_conversation(say, speaker):
    system = {"role": "system", "content": "Be brief."}
    right = answer_to(speaker, [system, user("Add 1.")]).text
    assert say("Add 1.", system="Be brief.").out == f"{right}\n"


def test_a_seed_can_be_given_within_a_conversation(say, speaker):
    warm = Sampling(max_new_tokens=6, temperature=1.0)
    right = answer_to(speaker, [user("Say.")], Sampling(max_new_tokens=6, temperature=1.0, seed=7))
    assert say("/seed 7", "Say.", sampling=warm).out == f"{right.text}\n"


def test_the_experts_of_the_last_answer_are_told(say, speaker):
    row = answer_to(speaker, [user("Add 1.")])
    told = say("/experts", "Add 1.", "/experts", "/quit", "never read").out.splitlines()
    assert told[0] == "nothing was answered yet"
    assert told[-1] == experts_line(speaker, row)
    shares = [int(part.rpartition(" ")[2].rstrip("%")) for part in told[-1].split(", ")]
    assert sum(shares) == pytest.approx(100, abs=2)
    assert shares == sorted(shares, reverse=True)


def test_the_expert_of_a_prompt_is_told_and_not_that_of_its_answer(mixture, base_folder, tokenizer):
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = mixture(base, num_experts=2, router_scope="prompt", top_k_experts=1)
    library, draw = SkillLibrary(model), torch.Generator().manual_seed(0)
    for expert, first in enumerate((4, 100)):  # each skill has ids of its own
        rows = torch.randint(first, first + 90, (40, 9), generator=draw).tolist()
        library.add(f"skill {expert}", rows[:20], rows[20:], expert=expert)
    row = Row(list(range(10, 16)), tokens=list(range(110, 190)))
    assert library.which(torch.tensor(row.prompt)).skill == "skill 0"
    assert library.which(torch.tensor([*row.prompt, *row.tokens])).skill == "skill 1"
    assert experts_line(Speaker(model, tokenizer), row) == "expert 0 100%"


def test_an_answer_that_was_ended_before_its_first_token_has_no_experts(say, speaker, monkeypatch):
    def interrupted(self, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(speaker), "answer", interrupted)
    assert say("Add 1.", "/experts").out.splitlines()[-1] == "nothing was answered yet"


def test_a_conversation_that_has_become_too_long_says_so_and_goes_on(say):
    shown = say("word " * 200, "Add 1.")
    assert "/reset forgets it" in shown.err
    assert shown.out.strip()
    assert "/experts" in say("/help").out


# Suggestions

RECORD = {"step": 5, "data": {"sources": [{"name": f"skill/{name}"} for name in ("json", "sql")]}}


def test_a_suggested_question_is_asked_by_its_number_and_by_itself(say, speaker):
    right = answer_to(speaker, [user("Count the rows of films.")]).text
    shown = say("Add 1.", "/2", "/3", suggested={"json": "x", "sql": "Count the rows of films."})
    assert f"\nCount the rows of films.\n{right}\n" in shown.out
    assert "/experts" in shown.out  # there is no third one


def test_a_question_that_the_run_answered_rightly_is_suggested_for_each_skill_of_its_rows(tmp_path):
    first = {skill: generate_tasks(skill, "test", 1)[0].instruction for skill in ("sql", "json")}
    assert suggested_questions(RECORD, tmp_path) == first
    assert suggested_questions({"step": 5}, tmp_path) == {}
    answers = [{"question": "a", "passed": False}, {"question": "b", "passed": True}]
    results = {"step": 5, "answers": {"sql": answers, "json": answers[:1]}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert suggested_questions(RECORD, tmp_path) == first | {"sql": "b"}
    assert suggested_questions(RECORD | {"step": 4}, tmp_path) == first  # other weights


@pytest.mark.parametrize("text", ["{", "[]", '{"step": 5, "answers": {"sql": [1]}}', "ESCAPE"])
def test_results_that_cannot_be_believed_suggest_nothing(tmp_path, text):
    if text == "ESCAPE":
        answers = {"sql": [{"question": "\x1b[2J", "passed": True}]}
        text = json.dumps({"step": 5, "answers": answers})
    (tmp_path / "results.json").write_text(text)
    found = suggested_questions(RECORD, tmp_path)
    assert found["sql"] == generate_tasks("sql", "test", 1)[0].instruction


# dylora generate


@pytest.fixture(scope="module")
def folder(speaker, base_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("mixtures") / "m"
    speaker.model.base_name = str(base_folder)
    speaker.model.save_pretrained(place)
    return place


def test_chat_opens_a_checkpoint_and_talks_to_it(folder, speaker, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Add 1.\n"))
    assert main(["chat", "--checkpoint", str(folder), "--max_new_tokens", "6"]) == 0
    assert capsys.readouterr().out == f"{answer_to(speaker, [user('Add 1.')]).text}\n"


def test_another_template_is_taken_on_request(folder, speaker, tokenizer, monkeypatch, capsys):
    other = Speaker(speaker.model, tokenizer, load_template("plain", tokenizer))
    row = Row(other.conversation([user("Add 1.")]), SAMPLING)
    other.answer([row])
    assert row.prompt != speaker.conversation([user("Add 1.")])
    monkeypatch.setattr("sys.stdin", io.StringIO("Add 1.\n"))
    argv = ["chat", "--checkpoint", str(folder), "--max_new_tokens", "6", "--template", "plain"]
    assert main(argv) == 0
    assert capsys.readouterr().out == f"{row.text}\n"


def test_a_file_of_prompts_is_answered_line_by_line_in_its_order(folder, tmp_path, speaker):
    asked = [
        {"prompt": "Add 1. Please, and at some length, so that it is not the shortest."},
        {"instruction": "Add.", "input": "1 and 2"},
        {"messages": [user("Add 3.")]},
    ]
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps(one) + "\n" for one in asked))
    argv = ["generate", "--checkpoint", str(folder), "--prompts", str(prompts)]
    argv += ["--max_new_tokens", "5", "--batch_size", "2"]
    assert main([*argv, "--out", str(out)]) == 0
    told = [json.loads(line) for line in out.read_text().splitlines()]
    prompts_ids = (
        speaker.question(asked[0]["prompt"]),
        speaker.question("Add.", "1 and 2"),
        speaker.conversation(asked[2]["messages"]),
    )
    for one, ids in zip(told, prompts_ids, strict=True):
        row = Row(ids, Sampling(max_new_tokens=5))
        speaker.answer([row])
        assert (one["text"], one["finish_reason"]) == (row.text, row.finish)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"question": "x"}', "p.jsonl:2: has neither prompt, instruction nor messages"),
        ('{"instruction": null}', "p.jsonl:2: has neither prompt, instruction nor messages"),
        ("{", "p.jsonl:2: not JSON"),
        ('{"prompt": "x", "prompt": "y"}', "p.jsonl:2: not JSON: the key 'prompt' stands twice"),
        ('["hi"]', "p.jsonl:2: of type list, not an object"),
        ("null", "p.jsonl:2: of type NoneType, not an object"),
        ('{"prompt": 3}', "p.jsonl:2: prompt is 3, but must be a text"),
        ('{"instruction": ["x"]}', "p.jsonl:2: instruction is ['x'], but must be a text"),
        ('{"instruction": "x", "input": 3}', "p.jsonl:2: input is 3, but must be a text"),
        ('{"prompt": "\\ud800"}', "p.jsonl:2: holds what is no text and no JSON"),
        ('{"messages": "hi"}', "p.jsonl:2: messages must be a list of objects"),
        ('{"messages": ["hi"]}', "p.jsonl:2: messages must be a list of objects"),
        ('{"messages": []}', "p.jsonl:2: the last message must be of the role user"),
        (json.dumps({"prompt": "word " * 200}), "prompt 2: the prompt has"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_named_before_any_is(
    folder, tmp_path, capsys, line, told
):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    prompts.write_text(f'{{"prompt": "x"}}\n{line}\n')
    argv = ["generate", "--checkpoint", str(folder), "--prompts", str(prompts), "--out", str(out)]
    assert main(argv) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("line", ['{"instruction": "x", "input": "y"}', '{"messages": []}'])
def test_a_row_that_only_a_template_takes_is_refused_with_raw(tmp_path, line):
    file = tmp_path / "p.jsonl"
    file.write_text(line.replace("[]", json.dumps([user("x")])))
    assert len(list(read_prompts(file))) == 1
    with pytest.raises(ValueError, match=r"p\.jsonl:1: has (input|messages), which only a temp"):
        list(read_prompts(file, raw=True))


@pytest.mark.parametrize("inside", ["\u2028", "\x85", "\x0b", "\x0c"])
def test_a_prompt_ends_at_a_line_feed_alone(tmp_path, inside):
    (tmp_path / "p.txt").write_text(f"a{inside}b\nc\n", encoding="utf-8")
    assert list(read_prompts(tmp_path / "p.txt")) == [{"prompt": f"a{inside}b"}, {"prompt": "c"}]


@pytest.mark.parametrize("inside", ["\u2028", "\x85"])
def test_a_row_may_hold_what_others_call_the_end_of_a_line(tmp_path, inside):
    one = {"prompt": f"a{inside}b"}
    (tmp_path / "p.jsonl").write_text(json.dumps(one, ensure_ascii=False), encoding="utf-8")
    assert list(read_prompts(tmp_path / "p.jsonl")) == [one]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "P.JSONL", "p.JSON", "p.jsonl.gz", "prompts"])
def test_prompts_are_read_by_the_ending_of_their_file_without_its_byte_order_mark(tmp_path, name):
    rows = "json" in name.lower()
    data = b"\xef\xbb\xbf" + (b'{"prompt": "a"}\r\n\r\n' if rows else b"a\r\n\r\n")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert list(read_prompts(tmp_path / name)) == [{"prompt": "a"}]


def test_a_file_of_prompts_that_is_not_there_is_no_set_of_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["generate", "--checkpoint", "c", "--prompts", "user/name", "--out", "o"]
    assert main(argv) == 2
    assert capsys.readouterr().err == "error: user/name does not exist\n"


def test_answers_without_a_folder_to_write_into_are_refused_before_a_checkpoint_loads(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a\n")
    argv = ["generate", "--checkpoint", "c", "--prompts", "p.txt", "--out", "answers/o.jsonl"]
    assert main(argv) == 2
    told = "error: --out is 'answers/o.jsonl', but must be a file in a folder that exists\n"
    assert capsys.readouterr().err == told


def test_answers_before_an_interruption_are_kept(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "p.txt").write_text("".join(f"prompt {number}\n" for number in range(40)))
    answer, calls = Speaker.answer, []

    def interrupted(self, rows):
        calls.append(len(rows))
        if len(calls) == 18:  # in the second window of 16 batches
            raise KeyboardInterrupt
        answer(self, rows)

    monkeypatch.setattr(Speaker, "answer", interrupted)
    out = tmp_path / "o.jsonl"
    argv = ["generate", "--checkpoint", str(folder), "--prompts", str(tmp_path / "p.txt")]
    argv += ["--out", str(out), "--batch_size", "2", "--max_new_tokens", "1"]
    assert main(argv) == 130
    assert capsys.readouterr().out == f"wrote 32 of 40 answers to {out}\n"
    told = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    assert told == [f"prompt {number}" for number in range(32)]


def test_generate_wants_one_prompt_or_one_file(capsys):
    for given in ([], ["--prompt", "x", "--prompts", "f", "--out", "o"]):
        assert main(["generate", "--checkpoint", "c", *given]) == 2
        assert "give either --prompt TEXT or --prompts FILE" in capsys.readouterr().err
    assert main(["generate", "--checkpoint", "c", "--prompts", "f"]) == 2
    assert "belong together" in capsys.readouterr().err
