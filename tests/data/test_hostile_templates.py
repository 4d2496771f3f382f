"""Chat templates that do not end or build gigabytes: each is told in one line, soon and in bounded memory."""

from __future__ import annotations

import multiprocessing
import pickle
import resource
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny import CHATML, tiny_tokenizer

from align.data.bounded_process import BoundedProcess, ProcessEnded
from align.data.rendering import chat_template, template_process
from align.data.rendering.chat_template import stop_token_ids
from align.data.rendering.conversation_rows import render_chat
from align.data.rendering.render_view import render_view
from align.errors import DataError
from align.models.tokenizers import PLAIN_TEMPLATE
from align.schema import Record, assistant, user

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}" + "{% endfor %}" * 3
HOSTILE = {
    "loops": LOOP + CHATML,
    "recurses": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}" + CHATML,
    "multiplies": "{{ 'a' * 10 ** 10 }}" + CHATML,
    "pads": "{{ 'a'.ljust(10 ** 10) }}" + CHATML,
    "formats": "{{ '%9999999999d' % 1 }}" + CHATML,
    "doubles": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
    + CHATML,
    "powers": "{% set x = 7 ** (7 ** 12) %}" + CHATML,
    "writes": "{% for a in range(90000) %}{% for b in range(1000) %}padding{% endfor %}{% endfor %}" + CHATML,
    "only when asked much": "{% if messages | length > 4 %}" + LOOP + "{% endif %}" + CHATML,
}
DROPS_THOUGHT = CHATML.replace("{{ message['content'] }}", "{{ message['content'] | trim }}").replace(
    "assistant\n{% endif", "assistant\n<think>\n{% endif"
)
TALK = [user("hello"), assistant("fox"), user("hello"), assistant("dog"), user("hello")]


@pytest.fixture
def one_second(monkeypatch):
    process = BoundedProcess("align.data.rendering.template_process:answer", 1, 1 << 28)
    monkeypatch.setattr(template_process, "_PROCESS", process)
    yield
    process.close()


QUICK = ("loops", "multiplies", "only when asked much")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in HOSTILE]
)
def test_a_hostile_template_ends_with_one_line_in_bounded_memory(kind, one_second):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = HOSTILE[kind]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pytest.raises(DataError, match=r"^chat template: .*; use another template") as caught:
        render_chat(TALK, tokenizer)

    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB; a text of 10 GB was asked for


def test_training_and_stop_tokens_are_bounded_too(one_second):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = HOSTILE["loops"]
    record = Record(prompt=[user("hello")], completion=[assistant("fox")])

    for use in (lambda: stop_token_ids(tokenizer), lambda: render_view("demonstration", [record], tokenizer, 100)):
        with pytest.raises(DataError, match="did not end within 1 s of computing"):
            use()


def test_what_a_template_raises_is_a_refusal_of_the_conversation():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages | length > 4 %}{{ 1 // 0 }}{% endif %}" + CHATML

    with pytest.raises(DataError, match=r"refused by the chat template: .ZeroDivisionError"):
        render_chat(TALK, tokenizer)
    assert render_chat(TALK[:1], tokenizer)


def test_the_text_is_the_one_transformers_writes():
    tokenizer = tiny_tokenizer()
    odd = [user("half \ud800 a character, 狐狸 \U0001f98a"), {"role": "assistant", "content": None, "tool_calls": []}]
    tokenizer.chat_template = (
        "{{ pad_token }}{{ tools | tojson }}{% for m in messages %}{{ m }}{% endfor %}{{ eos_token }}"
    )
    options = {"tools": [{"type": "function", "function": {"name": "f"}}], "add_generation_prompt": True}

    text = template_process.apply_template(tokenizer, odd, **options)

    assert text == tokenizer.apply_chat_template(odd, tokenize=False, **options)


def test_after_a_fork_each_process_has_its_own():
    tokenizer = tiny_tokenizer()
    here = render_chat(TALK, tokenizer)

    with multiprocessing.get_context("fork").Pool(2) as pool:
        there = pool.starmap(render_chat, [(TALK, tokenizer)] * 20)

    assert there == [here] * 20
    assert render_chat(TALK, tokenizer) == here


def test_several_threads_get_each_its_own_answer():
    process = BoundedProcess("builtins:bytes", 1, 1 << 28)
    texts = [bytes([65 + number]) * (1 + number * 40_000) for number in range(8)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(process.ask, texts))

    process.close()
    assert found == texts


def test_what_nobody_wants_any_more_is_given_up_and_the_next_request_is_answered():
    process = BoundedProcess("align.data.rendering.template_process:answer", 1000, 1 << 28)
    loop, plain = (pickle.dumps((template, TALK, {}, {})) for template in (LOOP, CHATML))

    with pytest.raises(ProcessEnded, match="was given up"):
        process.ask(loop, unwanted=lambda: True)

    assert process.ask(plain).startswith(b"+")
    process.close()


@pytest.mark.parametrize("template", [PLAIN_TEMPLATE, DROPS_THOUGHT])
def test_a_thousand_turns_are_found_with_a_few_renderings(template, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    stop_token_ids(tokenizer)
    talk = [user("Assistant: hello"), assistant("fox"), user("<think>\n Assistant: "), assistant("dog ")] * 250
    rendered: list[int] = []
    apply = template_process.apply_template
    monkeypatch.setattr(
        chat_template, "apply_template", lambda *words, **options: rendered.append(1) or apply(*words, **options)
    )

    ids = render_chat([*talk, user("hello")], tokenizer)

    assert len(rendered) < 6
    assert len(ids) > 5000
