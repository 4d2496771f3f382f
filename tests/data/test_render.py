from __future__ import annotations

import itertools
import random
import time

import pytest
from template_zoo import CLOSED, CONTROLS, build, build_spaced

from align.data.rendering.chat_template import stop_token_ids
from align.data.rendering.conversation_rows import NOTHING_TRAINED, render_chat
from align.data.rendering.render_view import render_view
from align.data.rendering.rendered_rows import TOO_LONG, UNTRAINED
from align.errors import DataError
from align.schema import Record, assistant, user

STOP = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "qwen3": "<|im_end|>", "mistral": "</s>"} | dict.fromkeys(
    ["deepseek", "plain", "open_middle"], "<|end|>"
)
WORDS = "the shop opens at nine <b> [x] \n\n几点 开门？ 🙂 , . hello world".split(" ")


@pytest.fixture(scope="module", params=CLOSED)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(name):
    return build(name)


def conversation(rng: random.Random, turns: int) -> list:
    """Alternating turns of random words, without space at the ends (which some templates trim)."""

    def words() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 8))).strip() or "hello"

    return [user(words()) if turn % 2 == 0 else assistant(words()) for turn in range(turns)]


def demonstration(messages: list) -> Record:
    return Record(prompt=messages[:1], completion=messages[1:])


def runs(row: dict, tokenizer) -> tuple[list[str], list[str]]:
    """Texts of the trained runs and of the others."""
    pairs = zip(row["input_ids"], row["completion_mask"], strict=True)
    texts: tuple[list[str], list[str]] = ([], [])
    for trained, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        texts[0 if trained else 1].append(tokenizer.decode([token for token, _ in run]))
    return texts


@pytest.mark.parametrize("turns", [2, 4, 6])
def test_trained_tokens_are_the_answers_and_their_stop_token(name, tokenizer, turns):
    rng = random.Random(turns)
    records = [demonstration(conversation(rng, turns)) for _ in range(20)]

    rows = render_view("demonstration", records, tokenizer, 2000).rows

    lead = {"mistral": " "}.get(name, "")
    for record, row in zip(records, rows, strict=True):
        messages = [*record.prompt, *record.completion]
        trained, rest = runs(row, tokenizer)
        answers = [lead + turn["content"] + STOP[name] for turn in messages if turn["role"] == "assistant"]
        if name == "qwen3":  # the last answer starts with the empty thinking part that its template writes
            answers[-1] = "<think>\n\n</think>\n\n" + answers[-1]
        assert trained == answers
        for turn in messages:
            if turn["role"] == "user":
                assert any(turn["content"] in text for text in rest)


def test_the_whole_row_is_the_text_the_template_writes(tokenizer):
    messages = conversation(random.Random(0), 4)

    row = render_view("demonstration", [demonstration(messages)], tokenizer, 2000).rows[0]

    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_tokens_and_masks_equal_those_of_a_template_with_generation_marks():
    tokenizer = build("chatml")
    said = "{{ m['content'] }}<|im_end|>"
    marked = f"{{% if m['role'] == 'assistant' %}}{{% generation %}}{said}{{% endgeneration %}}{{% else %}}{said}"
    template = tokenizer.chat_template.replace(f"{said}\n", marked + "{% endif %}{{ '\\n' }}")
    talks = [conversation(random.Random(seed), 2 + 2 * (seed % 3)) for seed in range(30)]

    rows = render_view("demonstration", [demonstration(talk) for talk in talks], tokenizer, 2000).rows

    for talk, row in zip(talks, rows, strict=True):
        expected = tokenizer.apply_chat_template(talk, chat_template=template, return_assistant_tokens_mask=True)
        assert row["input_ids"] == expected["input_ids"]
        assert row["completion_mask"] == list(expected["assistant_masks"])


def test_generation_sees_exactly_the_tokens_training_saw(name, tokenizer):
    messages = conversation(random.Random(3), 4)
    row = render_view("demonstration", [demonstration(messages)], tokenizer, 2000).rows[0]
    ids, mask = row["input_ids"], row["completion_mask"]

    first, second = render_chat(messages[:1], tokenizer), render_chat(messages[:3], tokenizer)

    starts = [place for place in range(1, len(mask)) if mask[place] and not mask[place - 1]]
    if name == "deepseek":  # its generation prompt opens a thinking part, which past answers lack
        opened = tokenizer.encode("<think>\n", add_special_tokens=False)
        first, second = first[: -len(opened)], second[: -len(opened)]
    assert first == ids[: starts[0]]
    assert second == ids[: starts[1]]


def test_prompt_rows_are_what_generation_sees(tokenizer):
    records = [Record(prompt=conversation(random.Random(n), 1)) for n in range(3)]

    rows = render_view("prompt", records, tokenizer, 500).rows

    assert [row["record"] for row in rows] == [0, 1, 2]
    assert [row["prompt_ids"] for row in rows] == [render_chat(record.prompt, tokenizer) for record in records]


def test_pairs_share_the_prompt_and_end_with_the_stop_token(name, tokenizer):
    prompt = conversation(random.Random(5), 3)
    record = Record(prompt=prompt, chosen=[assistant("at nine")], rejected=[assistant("hello world")])

    rendered = render_view("preference", [record], tokenizer, 500)

    row = rendered.rows[0]
    lead = {"mistral": " ", "qwen3": "<think>\n\n</think>\n\n"}.get(name, "")
    assert tokenizer.decode(row["chosen_ids"]) == f"{lead}at nine{STOP[name]}"
    assert tokenizer.decode(row["rejected_ids"]) == f"{lead}hello world{STOP[name]}"
    if name != "deepseek":
        assert row["prompt_ids"] == render_chat(prompt, tokenizer)
    assert rendered.trained_tokens == len(row["chosen_ids"]) + len(row["rejected_ids"])


def test_control_strings_in_the_data_stay_text(name, tokenizer):
    controls = CONTROLS[name]
    ids = {tokenizer.convert_tokens_to_ids(control) for control in controls}
    hostile = "a" + "b".join(controls) + controls[-1] * 2 + "c"
    harmless = [user("hello"), assistant("world")]

    row = render_view("demonstration", [demonstration([user(hostile), assistant(hostile)])], tokenizer, 2000).rows[0]
    expected = render_view("demonstration", [demonstration(harmless)], tokenizer, 2000).rows[0]

    def control_tokens(found: dict) -> list[int]:
        return [token for token in found["input_ids"] if token in ids]

    assert control_tokens(row) == control_tokens(expected)
    assert tokenizer.decode(row["input_ids"]).count(hostile) == 2
    assert tokenizer.decode([t for t, on in zip(*row.values(), strict=True) if on]).endswith(hostile + STOP[name])


def test_a_private_use_character_of_the_data_survives_beside_a_control_string():
    tokenizer = build("chatml")
    text = "\ue000<|im_end|>\ue001"

    row = render_view("demonstration", [demonstration([user(text), assistant(text)])], tokenizer, 200).rows[0]

    assert tokenizer.decode(row["input_ids"]).count(text) == 2


def test_the_begin_token_is_never_doubled():
    tokenizer = build("llama3")

    ids = render_chat([user("hello")], tokenizer)

    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("template", "stops"),
    [
        ("chatml", ["<|im_end|>"]),
        ("llama3", ["<|end_of_text|>", "<|eot_id|>"]),
        ("mistral", ["</s>"]),
        ("never_closed", ["<|end|>"]),
    ],
)
def test_stop_tokens_are_eos_and_what_closes_a_turn(template, stops):
    tokenizer = build(template)

    assert tokenizer.convert_ids_to_tokens(stop_token_ids(tokenizer)) == stops


def test_a_replaced_template_is_measured_again():
    tokenizer = build("llama3")
    before = stop_token_ids(tokenizer)

    tokenizer.chat_template = tokenizer.chat_template.replace("<|eot_id|>", "<|end_of_text|>")

    assert len(before) == 2
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]


def test_a_turn_whose_thinking_the_template_drops_is_context_and_told():
    tokenizer = build("qwen3")
    thought = "<think>\nit is late\n</think>\n\nat nine"
    messages = [user("hello"), assistant(thought), user("world"), assistant(thought)]

    rendered = render_view("demonstration", [demonstration(messages)], tokenizer, 500)

    trained, rest = runs(rendered.rows[0], tokenizer)
    assert trained == [f"{thought}<|im_end|>"]
    assert "assistant\nat nine<|im_end|>" in rest[0]
    assert rendered.noted == {UNTRAINED: 1}


def test_tools_and_calls_pass_through_the_template_and_calls_are_trained():
    tokenizer = build("qwen3")
    call = {"type": "function", "function": {"name": "hours", "arguments": {"day": "monday<|im_end|>"}}}
    messages = [
        user("hello"),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "nine <|im_end|>"},
        assistant("at nine"),
    ]
    tools = [{"type": "function", "function": {"name": "hours", "parameters": {}}}]
    record = Record(prompt=messages[:1], completion=messages[1:], tools=tools)

    row = render_view("demonstration", [record], tokenizer, 500).rows[0]

    trained, rest = runs(row, tokenizer)
    assert '{"name": "hours", "parameters": {}}' in rest[0]
    assert trained[0].endswith('"monday<|im_end|>"}}\n</tool_call><|im_end|>')
    assert trained[1].endswith("at nine<|im_end|>")
    assert "nine <|im_end|>" in rest[1]
    assert row["input_ids"].count(tokenizer.eos_token_id) == 5


def test_turns_marked_untrained_are_context():
    tokenizer = build("chatml")
    messages = [user("hello"), {**assistant("world"), "train": False}, user("shop"), assistant("at nine")]

    row = render_view("demonstration", [demonstration(messages)], tokenizer, 500).rows[0]

    assert runs(row, tokenizer)[0] == ["at nine<|im_end|>"]


def test_answers_that_nothing_closes_are_trained_up_to_their_last_word():
    tokenizer = build("open_middle")
    messages = [user("hello"), assistant("world"), user("shop"), assistant("at nine")]

    row = render_view("demonstration", [demonstration(messages)], tokenizer, 500).rows[0]

    assert runs(row, tokenizer)[0] == [" world", " at nine<|end|>"]


def test_a_template_that_never_closes_an_answer_is_refused():
    with pytest.raises(DataError, match="no control token follows an assistant turn"):
        render_view("demonstration", [demonstration([user("a"), assistant("b")])], build("never_closed"), 100)


def test_a_template_that_rewrites_answers_is_refused():
    tokenizer = build("open_middle")
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content'] }}{% if", "m['content'] | reverse }}{% if")
    record = demonstration([user("hello"), assistant("abc"), user("x"), assistant("def")])

    with pytest.raises(DataError, match="chat template"):
        render_view("demonstration", [record], tokenizer, 100)


def test_rows_the_template_refuses_are_counted_by_reason():
    tokenizer = build("mistral")
    good = demonstration([user("hello"), assistant("world")])
    bad = Record(prompt=[user("hello"), user("again")], completion=[assistant("world")])

    rendered = render_view("demonstration", [good, bad], tokenizer, 100)

    assert len(rendered.rows) == 1
    [(reason, count)] = rendered.dropped.items()
    assert "roles must alternate" in reason
    assert count == 1


def test_rows_that_train_nothing_are_dropped_and_data_that_trains_nothing_is_refused():
    tokenizer = build("chatml")
    silent = Record(prompt=[user("a")], completion=[{**assistant("b"), "train": False}])
    spoken = demonstration([user("a"), assistant("b")])

    rendered = render_view("demonstration", [silent, spoken], tokenizer, 100)

    assert rendered.dropped == {NOTHING_TRAINED: 1}
    with pytest.raises(DataError, match="no token to train: 1"):
        render_view("demonstration", [silent], tokenizer, 100)


def test_data_that_never_trains_a_stop_token_is_refused():
    tokenizer = build("open_middle")
    messages = [user("a"), assistant("b"), user("c"), {**assistant("d"), "train": False}]

    with pytest.raises(DataError, match="never end an answer"):
        render_view("demonstration", [demonstration(messages)], tokenizer, 100)


def test_long_rows_lose_their_oldest_turns_and_keep_system_question_and_answer():
    tokenizer = build("chatml")
    system = {"role": "system", "content": "hello"}
    old = [turn for n in range(6) for turn in (user(f"old question {n}"), assistant(f"old answer {n}"))]
    record = Record(prompt=[system, old[0]], completion=[*old[1:], user("the last"), assistant("at nine")])

    rendered = render_view("demonstration", [record], tokenizer, 120)

    text = tokenizer.decode(rendered.rows[0]["input_ids"])
    assert len(rendered.rows[0]["input_ids"]) <= 120
    assert text.startswith("<|im_start|>system\nhello<|im_end|>\n<|im_start|>user\nold question")
    assert text.endswith("the last<|im_end|>\n<|im_start|>assistant\nat nine<|im_end|>\n")
    assert "question 0" not in text
    assert rendered.shortened == 1
    assert runs(rendered.rows[0], tokenizer)[0][-1] == "at nine<|im_end|>"


def test_rows_too_long_for_their_last_exchange_are_dropped_and_counted():
    tokenizer = build("chatml")
    records = [demonstration([user("hello"), assistant("word " * n)]) for n in (1, 200)]

    rendered = render_view("demonstration", records, tokenizer, 60)

    assert len(rendered.rows) == 1
    assert rendered.dropped == {TOO_LONG: 1}
    with pytest.raises(DataError, match="0 are left"):
        render_view("demonstration", records[1:], tokenizer, 60)


def test_long_pairs_lose_old_turns_of_the_prompt_only():
    tokenizer = build("chatml")
    prompt = [user("old " * 30), assistant("older"), user("the last")]
    pair = Record(prompt=prompt, chosen=[assistant("at nine")], rejected=[assistant("at five")])
    hopeless = Record(prompt=[user("a")], chosen=[assistant("long " * 50)], rejected=[assistant("b")])

    rendered = render_view("preference", [pair, hopeless], tokenizer, 60)

    assert rendered.dropped == {TOO_LONG: 1}
    assert rendered.shortened == 1
    assert rendered.rows[0]["prompt_ids"] == render_chat([user("the last")], tokenizer)


def test_long_prompts_lose_old_turns_and_hopeless_ones_are_dropped():
    tokenizer = build("chatml")
    records = [Record(prompt=[user("old " * 40), assistant("x"), user("last")]), Record(prompt=[user("old " * 40)])]

    rendered = render_view("prompt", records, tokenizer, 40)

    assert [row["record"] for row in rendered.rows] == [0]
    assert rendered.rows[0]["prompt_ids"] == render_chat([user("last")], tokenizer)
    assert rendered.dropped == {TOO_LONG: 1}


def test_margins_are_passed_on_when_every_pair_has_one():
    tokenizer = build("chatml")
    pairs = [
        Record(prompt=[user("a")], chosen=[assistant("b")], rejected=[assistant("c")], margin=m) for m in (1.0, 2.0)
    ]

    assert [row["margin"] for row in render_view("preference", pairs, tokenizer, 60).rows] == [1.0, 2.0]
    pairs[0].margin = None
    assert "margin" not in render_view("preference", pairs, tokenizer, 60).rows[1]


def test_texts_are_packed_with_eos_after_every_document():
    tokenizer = build("chatml")
    texts = ["the shop opens", "at nine", "<|im_end|>"]
    stream: list[int] = []
    for text in texts[:2]:
        stream += [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]

    rendered = render_view("text", [Record(text=text) for text in texts], tokenizer, 4)

    packed = [token for row in rendered.rows for token in row["input_ids"]]
    assert all(len(row["input_ids"]) == 4 for row in rendered.rows)
    assert packed[: len(stream)] == stream
    assert packed[len(stream) :].count(tokenizer.eos_token_id) <= 1
    assert rendered.tokens == len(packed)


def test_a_private_use_character_of_a_document_survives():
    tokenizer = build("chatml")
    texts = ["\ue000 a", "\ue000<|im_end|>"]

    [row] = render_view("text", [Record(text=text) for text in texts], tokenizer, 100).rows

    assert tokenizer.decode(row["input_ids"]) == "\ue000 a<|im_end|>\ue000<|im_end|><|im_end|>"
    assert row["input_ids"].count(tokenizer.eos_token_id) == 2


def test_reasoning_kept_apart_reaches_the_template_and_is_trained():
    tokenizer = build("chatml")
    thinking = "{% if m['reasoning_content'] %}<{{ m['reasoning_content'] }}>{% endif %}{{ m['content'] }}"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m['content'] }}", thinking)
    answer = {**assistant("at nine"), "reasoning_content": "late<|im_end|>"}

    row = render_view("demonstration", [demonstration([user("hello"), answer])], tokenizer, 100).rows[0]

    assert runs(row, tokenizer)[0] == ["<late<|im_end|>>at nine<|im_end|>"]


def test_a_conversation_the_template_refuses_is_no_document():
    bad = Record(prompt=[user("a"), user("b")], completion=[assistant("c")])

    rendered = render_view("text", [bad, demonstration([user("a"), assistant("b")])], build("mistral"), 1000)

    assert len(rendered.rows) == 1
    assert "roles must alternate" in next(iter(rendered.dropped))


def test_the_last_block_is_dropped_unless_it_is_the_only_one():
    tokenizer = build("chatml")
    records = [Record(text="hello world " * 9)]
    length = len(tokenizer.encode(records[0].text, add_special_tokens=False)) + 1

    alone, two = (
        render_view("text", records, tokenizer, length + 5),
        render_view("text", records, tokenizer, length - 1),
    )

    assert [len(row["input_ids"]) for row in alone.rows] == [length]
    assert alone.dropped == {}
    assert [len(row["input_ids"]) for row in two.rows] == [length - 1]
    assert two.dropped == {"last block not full": 1}


@pytest.mark.parametrize("template", ["chatml", "mistral", "plain"])
def test_a_tokenizer_that_puts_a_space_first_gets_none_inside_the_text(template):
    tokenizer = build_spaced(template)
    messages = [
        user("hello" + CONTROLS[template][-1] + "there"),
        assistant("at nine"),
        user("more"),
        assistant("the end"),
    ]

    row = render_view("demonstration", [demonstration(messages)], tokenizer, 500).rows[0]

    text = tokenizer.decode(row["input_ids"])
    before = {"chatml": "assistant\n", "mistral": "[/INST] ", "plain": "Assistant: "}[template]
    assert f"hello{CONTROLS[template][-1]}there" in text
    assert f"{before}at nine{tokenizer.eos_token}" in text
    assert f"{before}the end{tokenizer.eos_token}" in text
    assert render_chat(messages[:1], tokenizer) == row["input_ids"][: row["completion_mask"].index(1)]


def test_no_template_and_no_rows_are_errors():
    tokenizer = build("chatml")
    with pytest.raises(DataError, match="no rows given"):
        render_view("prompt", [], tokenizer, 100)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        render_chat([user("a")], tokenizer)


def test_a_conversation_the_template_refuses_cannot_be_generated_from():
    with pytest.raises(DataError, match="roles must alternate"):
        render_chat([user("a"), user("b")], build("mistral"))


def test_a_thousand_rows_render_in_seconds():
    tokenizer = build("chatml")
    rng = random.Random(0)
    records = [demonstration(conversation(rng, 4)) for _ in range(1000)]

    start = time.process_time()
    render_view("demonstration", records, tokenizer, 1000)

    assert time.process_time() - start < 10  # about half a second on an idle core


def test_a_conversation_is_a_document_written_by_the_template_and_closed_by_eos():
    from tiny import tiny_tokenizer

    from align.data.rendering.render_view import render_view
    from align.schema import Record, assistant, user

    tokenizer = tiny_tokenizer()
    chat = Record(prompt=[user("hi")], completion=[assistant("fox <|im_end|> dog")])
    page = Record(text="blue eggs")

    rendered = render_view("text", [page, chat, page], tokenizer, max_length=1000)

    ids = rendered.rows[0]["input_ids"]
    assert tokenizer.decode(ids) == (
        "blue eggs<|im_end|><|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nfox <|im_end|> dog<|im_end|>blue eggs<|im_end|>"
    )
    # One after each page, one after each turn; the one the text spells out is plain text.
    assert ids.count(tokenizer.eos_token_id) == 4


def test_a_conversation_can_be_continued_inside_its_last_answer():
    messages = [user("hello"), assistant("world"), user("shop"), assistant("at ni")]
    expected = {"chatml": "assistant\nat ni", "mistral": "[/INST] at ni", "qwen3": "</think>\n\nat ni"}

    for name, end in expected.items():
        tokenizer = build(name)
        ids = render_chat(messages, tokenizer, continue_final=True)

        assert tokenizer.decode(ids).endswith(end)
        assert ids[: len(render_chat(messages[:3], tokenizer))] == render_chat(messages[:3], tokenizer)


@pytest.mark.parametrize("last", [user("at ni"), {**assistant(""), "tool_calls": [{"function": {"name": "f"}}]}])
def test_only_an_assistant_turn_of_text_can_be_continued(last):
    with pytest.raises(DataError, match="to continue"):
        render_chat([user("hello"), last], build("chatml"), continue_final=True)


def test_a_variable_of_the_template_can_be_set_for_a_prompt():
    tokenizer = build("chatml")
    closed = "assistant\n{% if think is false %}<think></think>{% endif %}{% endif %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{% endif %}", closed)

    ids = render_chat([user("hello")], tokenizer, template_kwargs={"think": False})

    assert tokenizer.decode(ids).endswith("assistant\n<think></think>")
    assert tokenizer.decode(render_chat([user("hello")], tokenizer)).endswith("assistant\n")


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "tokenize", "eos_token", "thinkk", "1"])
def test_a_variable_that_is_not_to_be_set_or_never_read_is_refused_by_name(name):
    with pytest.raises(DataError, match=f"chat_template_kwargs: .*{name}"):
        render_chat([user("hello")], build("chatml"), template_kwargs={name: True})
