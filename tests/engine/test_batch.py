"""Rows that join, leave and end at any step, and what every row may ask for itself."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import torch
from loud_models import bare_engine, build_loaded_base

from align.engine import batch
from align.engine.local import LocalEngine
from align.engine.protocol import EngineBusy, GenerationRequest, Row, RowDelta, RowDone, RowFailure, Sampling
from align.engine.stream import Stream
from align.errors import IntegrityError, UsageError
from align.schema import assistant, user

PROMPTS = [
    [user("the quick brown fox")],
    [user("a rather longer question than the first one, with nine blue eggs and a lazy dog that jumps over")],
    [user("狐狸在哪里?")],
]
HOT = Sampling(temperature=1.0, max_new_tokens=24)
LONG = Sampling(temperature=1.0, max_new_tokens=1500)
SAMPLINGS = [
    HOT,
    Sampling(temperature=0.0, max_new_tokens=9),
    Sampling(temperature=0.0, max_new_tokens=30, repetition_penalty=1.5),
    Sampling(temperature=1.5, top_k=20, max_new_tokens=40),
    Sampling(temperature=0.8, top_p=0.7, max_new_tokens=17, frequency_penalty=0.5),
    Sampling(temperature=1.0, min_p=0.05, max_new_tokens=33, presence_penalty=1.0, stop=("fox", "e")),
]


def random_rows(models: list[str], count: int, seed: int) -> list[Row]:
    rng = random.Random(seed)
    return [
        Row(rng.choice(models), rng.choice(PROMPTS), rng.randrange(1000), rng.choice(SAMPLINGS)) for _ in range(count)
    ]


def done(stream) -> list[RowDone | RowFailure]:
    return sorted((event for event in stream if not isinstance(event, RowDelta)), key=lambda event: event.row)


@pytest.fixture
def widths(monkeypatch) -> list[int]:
    """How many rows each pass of the model held."""
    found: list[int] = []
    plain = batch.sample_tokens

    def counted(logits, rows):
        found.append(len(rows))
        return plain(logits, rows)

    monkeypatch.setattr(batch, "sample_tokens", counted)
    return found


def test_fifty_concurrent_requests_of_every_kind_equal_their_solo_runs(engine):
    rows = random_rows(engine.models, 50, seed=1)
    lost = threading.Event()

    def ask(place: int) -> str | None:
        time.sleep(place % 7 / 100)
        stream = engine.submit(GenerationRequest((rows[place],)))
        if place % 5 == 4:  # a client that goes away
            next(iter(stream))
            stream.cancel()
        events = list(stream)
        if not isinstance(events[-1], RowDone):
            lost.set()
        return None if place % 5 == 4 else events[-1].text

    with ThreadPoolExecutor(50) as pool:
        together = list(pool.map(ask, range(50)))

    assert not lost.is_set()
    assert engine.waiting == 0
    for row, text in zip(rows, together, strict=True):
        assert text is None or text == engine.complete([row], HOT)[0]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_crowd_that_comes_goes_asks_and_floods_gets_every_answer_and_the_right_one(tiny_base, seed, gate):
    from loud_models import loud_lora

    loaded = build_loaded_base(tiny_base)
    loaded.model.add_adapter("adapter2", loud_lora(3, use_dora=True))
    loaded.model.eval()
    loaded.adapters["dora@v1"] = "adapter2"
    engine = LocalEngine(loaded, max_rows=8, max_tokens=1000, max_waiting_rows=12)
    rows = random_rows(engine.models, 80, seed)
    talk = [*PROMPTS[0], assistant("over the dog")]
    expected_shift = engine.token_shift("blue@v1", talk)
    refused = []

    def ask(place: int) -> tuple[bool, str | None]:
        """Whether exactly one last event came, and the text of a row that was not broken off."""
        chance = random.Random(seed * 1000 + place)
        time.sleep(chance.random())
        if chance.random() < 0.1 and engine.token_shift("blue@v1", talk) != expected_shift:
            return False, None
        while True:
            try:
                stream = engine.submit(GenerationRequest((rows[place],)))
                break
            except EngineBusy:
                refused.append(place)
                time.sleep(0.05)
        cancelled = chance.random() < 0.25
        if cancelled:
            time.sleep(chance.random() / 10)
            stream.cancel()
        events = list(stream)
        time.sleep(0.01)
        one_end = [isinstance(event, RowDone) for event in events] == [*[False] * (len(events) - 1), True]
        return one_end and stream._events.empty(), None if cancelled else events[-1].text

    gate.close()
    with ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(ask, place) for place in range(len(rows))]
        while not refused:
            time.sleep(0.01)
        gate.open()
        found = [each.result() for each in asked]

    assert all(fine for fine, _ in found)
    assert engine.waiting == 0
    for row, (_, text) in zip(rows, found, strict=True):
        assert text is None or text == engine.complete([row], HOT)[0]
    engine.close()


def test_a_row_that_comes_later_is_written_at_once_and_changes_nothing(engine):
    first, second = Row("red@v1", PROMPTS[1], 3), Row("blue@v1", PROMPTS[0], 4)
    lasting = Sampling(temperature=1.0, max_new_tokens=300)
    running = engine.submit(GenerationRequest((first,), lasting))
    said = next(iter(running)).text

    [later] = done(engine.submit(GenerationRequest((second,), HOT)))
    running.cancel()
    said += "".join(event.text for event in running if isinstance(event, RowDelta))

    assert later.text == engine.complete([second], HOT)[0]
    assert len(said) > 24
    assert engine.complete([first], lasting)[0].startswith(said[:100])


def rows_that_come_and_go() -> list[Row]:
    """Prompts shorter and longer than a window of 16, answers that pass it, padding that comes and goes."""
    texts = [
        "a fox",
        "nine blue eggs",
        "the lazy dog runs far away from here to there with nine blue eggs over the fox",
    ]
    lengths = [Sampling(temperature=1.0, max_new_tokens=4 + 7 * (place % 4)) for place in range(9)]
    return [Row("base@v1", [user(texts[place % 3])], place, lengths[place]) for place in range(9)]


@pytest.mark.parametrize("architecture", ["mistral", "gemma2"])
def test_rows_join_and_leave_where_attention_slides(architecture, tmp_path):
    from zoo import build_zoo_model

    engine = bare_engine(build_zoo_model(architecture, tmp_path), max_rows=3, prefill_chunk_tokens=7)
    rows = rows_that_come_and_go()

    together = engine.complete(rows, HOT)

    assert together == [engine.complete([row], HOT)[0] for row in rows]
    engine.close()


_SMALL = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2}
RECURRENT = {
    "mamba": _SMALL | {"state_size": 8},
    "lfm2": _SMALL
    | {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"max_position_embeddings": 128, "layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("architecture", RECURRENT)
def test_rows_of_recurrent_models_wait_for_a_batch_of_their_own_and_leave_at_any_step(architecture, tmp_path, widths):
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed
    from zoo import zoo_tokenizer

    set_seed(0)
    tokenizer = zoo_tokenizer("qwen3")
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(architecture, **RECURRENT[architecture], **special)
    ).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = bare_engine(tmp_path, max_rows=3, prefill_chunk_tokens=7)
    rows = rows_that_come_and_go()

    together = engine.complete(rows, HOT)

    assert set(widths) == {1, 2, 3}
    assert together == [engine.complete([row], HOT)[0] for row in rows]
    engine.close()


def test_a_stopped_row_is_off_the_model_with_the_next_step(engine, widths, gate):
    gate.close(after=10)
    stream = engine.submit(GenerationRequest((Row("red@v1", PROMPTS[0], 1), Row("blue@v1", PROMPTS[0], 1)), LONG))
    events = iter(stream)
    while len(widths) < 10:
        time.sleep(0.01)

    stream.cancel(0)
    gate.open()
    ended = next(event for event in events if isinstance(event, RowDone))
    while len(widths) < 20:
        assert isinstance(next(events), RowDelta)
    stream.cancel()

    # One pass was on its way when the row was stopped.
    assert (ended.row, ended.reason) == (0, "cancelled")
    assert set(widths[12:]) == {1}
    assert widths[0] == 2


def test_rows_beyond_the_batch_wait_their_turn_and_the_place_of_one_that_ends_is_taken_at_once(tiny_base, widths):
    engine = LocalEngine(build_loaded_base(tiny_base), max_rows=2)
    short, long = Sampling(temperature=0.0, max_new_tokens=3), Sampling(temperature=0.0, max_new_tokens=12)
    rows = [Row("red@v1", PROMPTS[0], 0, long), *(Row("blue@v1", PROMPTS[0], 0, short) for _ in range(3))]

    stream = engine.submit(GenerationRequest(tuple(rows)))
    ended = [event.row for event in stream if isinstance(event, RowDone)]
    engine.close()

    assert ended == [1, 2, 3, 0]
    assert max(widths) == 2


def test_a_batch_holds_no_more_tokens_than_it_may(tiny_base, widths):
    engine = LocalEngine(build_loaded_base(tiny_base), max_tokens=200)
    rows = [Row("red@v1", PROMPTS[0], seed, Sampling(temperature=0.0, max_new_tokens=60)) for seed in range(5)]
    wide = Row("red@v1", [user("fox " * 300)], 0, Sampling(temperature=0.0, max_new_tokens=5))

    texts = engine.complete([*rows, wide], HOT)
    engine.close()

    assert all(texts)
    # A prompt of about 23 tokens and 60 new ones: two rows are at most 166.
    assert max(widths) == 2


def test_a_prompt_that_cannot_be_read_does_not_end_the_rows_beside_it(engine, monkeypatch):
    running = engine.submit(GenerationRequest((Row("red@v1", PROMPTS[0], 3),), LONG))
    next(iter(running))
    with monkeypatch.context() as patch:
        patch.setattr(batch, "pad_left", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory, say")))
        [failed] = done(engine.submit(GenerationRequest((Row("blue@v1", PROMPTS[0], 1),), HOT)))

    assert isinstance(failed, RowFailure)
    assert "out of memory, say" in failed.message
    assert isinstance(next(iter(running)), RowDelta)
    running.cancel()
    done(running)


@pytest.mark.gpu
def test_on_an_accelerator_rows_equal_their_solo_runs_and_those_of_the_cpu(tiny_base, engine):
    loaded = build_loaded_base(tiny_base)
    loaded.model.to("cuda")
    fast = LocalEngine(loaded)
    rows = random_rows(fast.models, 40, seed=2)

    together = fast.complete(rows, HOT)

    assert together == [fast.complete([row], HOT)[0] for row in rows]
    assert together == engine.complete(rows, HOT)
    assert fast.token_shift("red@v1", [*PROMPTS[0], assistant("over")])
    fast.close()


def test_a_queue_that_is_full_says_when_to_come_back(tiny_base, gate):
    engine = LocalEngine(build_loaded_base(tiny_base), max_rows=1, max_waiting_rows=3)
    gate.close(after=10)
    running = engine.submit(GenerationRequest((Row("red@v1", PROMPTS[0], 3),), LONG))
    next(iter(running))
    waiting = [engine.submit(GenerationRequest((Row("blue@v1", PROMPTS[0], seed),), HOT)) for seed in range(3)]

    assert engine.waiting == 3
    with pytest.raises(EngineBusy, match="3 answers are waiting") as refused:
        engine.submit(GenerationRequest((Row("blue@v1", PROMPTS[0]),), HOT))
    running.cancel()
    gate.open()

    assert 1 <= refused.value.retry_after <= 60
    assert refused.value.exit_code == 6
    assert all(isinstance(done(stream)[0], RowDone) for stream in waiting)
    assert engine.complete([Row("blue@v1", PROMPTS[0])], HOT)
    engine.close()


def test_a_row_may_end_with_its_first_token(engine):
    one = Sampling(temperature=0.0, max_new_tokens=1)
    rows = (*(Row(model, PROMPTS[0], 0, one) for model in engine.models), Row("red@v1", PROMPTS[0], 1))

    *short, long = done(engine.submit(GenerationRequest(rows, HOT)))

    assert [(event.completion_tokens, event.reason) for event in short] == [(1, "length")] * 3
    assert long.text == engine.complete([rows[-1]], HOT)[0]


def test_every_row_may_have_its_own_sampling(engine):
    rows = (Row("red@v1", PROMPTS[0], 1, Sampling(temperature=0.0, max_new_tokens=5)), Row("red@v1", PROMPTS[0], 1))

    short, other = done(engine.submit(GenerationRequest(rows, HOT)))

    assert short.completion_tokens == 5
    assert other.text == engine.complete([rows[1]], HOT)[0]
    assert other.completion_tokens > 5


def test_a_raw_text_is_continued_as_it_stands(engine, loaded):
    tokenizer = loaded.tokenizer
    text = "the quick <|im_end|> brown"

    [event] = done(engine.submit(GenerationRequest((Row("base@v1", [], text=text),), Sampling(0.0, max_new_tokens=8))))

    ids = torch.tensor([tokenizer.encode(text)])
    with loaded.model.disable_adapter():
        plain = loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
    assert event.prompt_tokens == ids.shape[1]
    assert event.text == tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)


def test_an_empty_text_fails_its_row_only(engine):
    empty, other = done(engine.submit(GenerationRequest((Row("red@v1", [], text=""), Row("red@v1", PROMPTS[0])), HOT)))

    assert isinstance(empty, RowFailure)
    assert (empty.fault, "no tokens" in empty.message) == ("prompt", True)
    assert isinstance(other, RowDone)


def test_a_stop_string_ends_the_row_and_is_not_shown(engine):
    row = Row("red@v1", PROMPTS[0], 1)
    whole = engine.complete([row], HOT)[0]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]

    events = list(engine.submit(GenerationRequest((row,), Sampling(temperature=1.0, max_new_tokens=24, stop=(stop,)))))

    shown = "".join(event.text for event in events if isinstance(event, RowDelta))
    assert shown == events[-1].text == whole[: whole.find(stop)]
    assert events[-1].reason == "stop"


def test_log_probs_are_those_of_one_pass_over_the_answer(loaded):
    from align.data.rendering.conversation_rows import render_chat

    row = Row("red@v1", PROMPTS[0], 2, logprobs=3)
    # Closed before the model is used beside it: adapters are on until the thread has left its last step.
    with closing(LocalEngine(loaded)) as engine:
        events = list(engine.submit(GenerationRequest((row, Row("blue@v1", PROMPTS[1], 2)), HOT)))
    tokens = [token for event in events if isinstance(event, RowDelta) and event.row == 0 for token in event.tokens]

    prompt = render_chat(PROMPTS[0], loaded.tokenizer)
    ids = torch.tensor([[*prompt, *(token.id for token in tokens)]])
    with torch.inference_mode():
        logits = loaded.model(input_ids=ids, adapter_names=["adapter0"]).logits
    expected = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    assert len(tokens) == 24
    assert [token.logprob for token in tokens] == pytest.approx(
        [float(line[token.id]) for token, line in zip(tokens, expected, strict=True)], abs=1e-4
    )
    for token, line in zip(tokens, expected, strict=True):
        assert [each.logprob for each in token.top] == pytest.approx(line.topk(3).values.tolist(), abs=1e-4)
        assert token.text == loaded.tokenizer.decode([token.id])
    assert not any(event.tokens for event in events if isinstance(event, RowDelta) and event.row == 1)


@pytest.mark.parametrize("options", [{"logprobs": 21}, {"logprobs": -1}, {"seed": 2**64}, {"text": "x"}])
def test_rows_that_make_no_sense_are_refused(options):
    with pytest.raises(UsageError):
        Row("red@v1", PROMPTS[0], **options)


@pytest.mark.parametrize(
    "precision", [{"bf16": True}, {"quantization": "nf4"}, {"quantization": "int8"}, {"quantization": "int4"}], ids=str
)
def test_a_base_held_small_serves_all_its_models_too(precision, tmp_path, tiny_base):
    from loud_models import save_adapters

    from align.models.adapters import load_models
    from align.models.loading import Precision
    from align.registry import open_registry

    if precision == {"quantization": "int4"} and not Precision("int4").rounds_layers:
        pytest.skip("needs a CPU with AVX512-VNNI")
    references, registry = [*save_adapters(tiny_base, tmp_path), str(tiny_base)], open_registry(tmp_path / "registry")
    loaded = load_models(registry, references, Precision(**precision))
    adapters = [value for key, value in loaded.model.named_parameters() if "lora_" in key]
    engine = LocalEngine(loaded)
    rows = [Row(model, PROMPTS[0], 1) for model in engine.models]

    texts = engine.complete([*rows, *rows], HOT)
    engine.close()

    assert adapters
    assert all(value.dtype == torch.float32 for value in adapters)
    assert not any(fact.runs_alone for fact in engine.facts)
    assert texts[:3] == texts[3:]
    assert len(set(texts)) == 3
    exact = LocalEngine(load_models(registry, references, Precision(bf16=False)))
    exact.close()
    moved, expected = ([fact.logit_difference for fact in one.facts] for one in (engine, exact))
    assert moved == pytest.approx(expected, rel=0.3)


def test_the_model_is_as_before_when_the_last_event_of_the_last_row_comes(engine, monkeypatch):
    model, found = engine._loaded.model, []
    plain = Stream.put

    def noted(stream, event):
        if isinstance(event, RowDone):
            found.append(any("forward" in vars(module) for module in model.modules()))
        plain(stream, event)

    monkeypatch.setattr(Stream, "put", noted)
    engine.complete([Row(model, PROMPTS[0], 1) for model in engine.models], HOT)
    engine.complete([Row(engine.models[0], PROMPTS[1], 1)], HOT)

    assert found == [False] * 4


@pytest.fixture
def saved(tiny_base, tmp_path) -> tuple[Path, list[str]]:
    from loud_models import save_adapters

    return tmp_path, save_adapters(tiny_base, tmp_path)


def load(folder: Path, references: list[str]):
    from align.models.adapters import load_models
    from align.models.loading import Precision
    from align.registry import open_registry

    return load_models(open_registry(folder / "registry"), references, Precision(bf16=False))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda key, tensor: {key: tensor * 0 if "lora_B" in key else tensor}, "changes nothing"),
        (lambda key, tensor: {key.replace("layers", "blocks"): tensor}, "do not fit its base"),
        (lambda key, tensor: {} if "layers.1.mlp" in key else {key: tensor}, "do not fit its base"),
    ],
)
def test_an_adapter_that_does_nothing_or_fits_nothing_never_reaches_the_engine(saved, change, said):
    from safetensors.torch import load_file, save_file

    folder, references = saved
    path = Path(references[1]) / "adapter_model.safetensors"
    state = load_file(path)
    save_file({key: value for old, tensor in state.items() for key, value in change(old, tensor).items()}, path)

    with pytest.raises(IntegrityError, match=said):
        load(folder, references)


def test_a_model_that_says_something_else_in_a_mixed_batch_runs_alone(tiny_base, monkeypatch):
    from align.engine import adapter_groups

    plain = adapter_groups._mixed_logits

    def served_by_the_base(model, ids, names):
        found = plain(model, ids, names)
        return found | {"adapter1": found[adapter_groups.BASE]}

    monkeypatch.setattr(adapter_groups, "_mixed_logits", served_by_the_base)
    engine = LocalEngine(build_loaded_base(tiny_base))
    engine.close()

    assert engine.notes == ["blue@v1: this architecture's rows run one model after the other"]
