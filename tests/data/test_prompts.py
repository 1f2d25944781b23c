import pytest

from dylora.data.prompts import (
    encode_answers,
    encode_prompts,
    eos_token_id,
    format_prompt,
    mbpp_instruction,
    pad_token_id,
)

BOS, EOS = 1, 2


def test_an_empty_input_has_no_section():
    assert "### Input" not in format_prompt("Say hello")
    assert format_prompt("Add them", "1, 2") == (
        "### Instruction:\nAdd them\n\n### Input:\n1, 2\n\n### Response:\n"
    )


def test_braces_in_a_question_are_text():
    assert "{instruction} {0}" in format_prompt("{instruction} {0}", "{input}")


def test_mbpp_shows_the_first_test():
    shown = mbpp_instruction("Add two numbers. ", "assert add(1, 2) == 3")
    assert shown == "Add two numbers.\nYour code should satisfy this test: assert add(1, 2) == 3"


def test_a_prompt_begins_with_bos_where_the_tokenizer_wants_it(make_tokenizer):
    prompt = [format_prompt("Add")]
    with_bos = encode_prompts(make_tokenizer(begins=True), prompt)[0]
    without = encode_prompts(make_tokenizer(begins=False), prompt)[0]
    assert with_bos == [BOS, *without]
    assert BOS not in without


def test_a_prompt_never_ends_in_the_eos_that_a_tokenizer_appends(make_tokenizer):
    prompt = [format_prompt("Add")]
    plain = encode_prompts(make_tokenizer(), prompt)
    assert encode_prompts(make_tokenizer(ends=True), prompt) == plain


def test_text_that_reads_like_a_special_token_stays_text(tokenizer):
    html = "Use <s>old</s> for crossed-out text"
    (prompt,) = encode_prompts(tokenizer, [format_prompt(html)])
    (answer,) = encode_answers(tokenizer, [html])
    assert prompt.count(BOS) == 1
    assert EOS not in prompt
    assert not {BOS, EOS} & set(answer)
    assert tokenizer.decode(answer) == html


@pytest.mark.parametrize(
    "answer",
    ["def f():\n    return 1", "\n\nafter lines", "   indented", "x", "\ttab", "\u2028 é 漢"],
)
def test_prompt_and_answer_decode_to_their_texts_joined(tokenizer, answer):
    prompt = format_prompt("Add")
    ids = encode_prompts(tokenizer, [prompt])[0][1:] + encode_answers(tokenizer, [answer])[0]
    assert tokenizer.decode(ids) == prompt + answer


def test_an_answer_gets_no_space_in_front(spaced_tokenizer):
    alone = spaced_tokenizer("def add", add_special_tokens=False)["input_ids"]
    assert spaced_tokenizer.convert_ids_to_tokens(alone)[0].startswith("▁")
    prompt = format_prompt("Add")
    ids = encode_prompts(spaced_tokenizer, [prompt])[0]
    ids += encode_answers(spaced_tokenizer, ["def add"])[0]
    assert spaced_tokenizer.decode(ids) == prompt + "def add"


def test_answers_keep_their_order_when_some_merge_with_the_newline(make_tokenizer):
    tokenizer = make_tokenizer()
    answers = ["one", "\n\n  two", "three", "\n\n\nfour"]
    together = encode_answers(tokenizer, answers)
    assert together == [encode_answers(tokenizer, [answer])[0] for answer in answers]
    assert [tokenizer.decode(ids) for ids in together] == answers


def test_eos_pads_where_there_is_no_pad(make_tokenizer):
    assert pad_token_id(make_tokenizer()) == 0
    assert pad_token_id(make_tokenizer(pad=None)) == EOS


def test_a_tokenizer_without_eos_is_an_error(make_tokenizer):
    with pytest.raises(ValueError, match="no EOS token"):
        eos_token_id(make_tokenizer(eos=None))
    with pytest.raises(ValueError, match="no EOS token"):
        pad_token_id(make_tokenizer(eos=None, pad=None))
