from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from loud_models import build_loaded_base, loud_base

from align.engine import batch
from align.engine.local import LocalEngine
from align.engine.protocol import GenerationRequest, Row, RowDelta, RowDone, RowFailure, Sampling
from align.errors import IntegrityError
from align.models.tokenizers import StopTokens
from align.schema import assistant, user

HOT = Sampling(temperature=1.0, max_new_tokens=24)
GREEDY = Sampling(temperature=0.0, max_new_tokens=24)
LONG = Sampling(temperature=1.0, max_new_tokens=1500)
PROMPTS = [
    [user("the quick brown fox")],
    [user("hello"), assistant("here"), user("a rather longer question than the first one, with nine blue eggs")],
    [user("狐狸在哪里?")],
]


def ended(stream) -> list:
    return sorted((event for event in stream if not isinstance(event, RowDelta)), key=lambda event: event.row)


@pytest.mark.parametrize("sampling", [HOT, GREEDY, Sampling(temperature=0.8, top_p=0.7, max_new_tokens=24)])
def test_every_row_of_a_mixed_batch_equals_its_solo_run(engine, sampling):
    rows = [Row(model, prompt, seed) for model in engine.models for seed, prompt in enumerate(PROMPTS)]

    together = engine.complete(rows, sampling)

    assert together == [engine.complete([row], sampling)[0] for row in rows]
    assert len(set(together)) > 5


def test_a_greedy_row_is_what_plain_generate_writes(engine, loaded):
    from align.data.rendering.conversation_rows import render_chat

    ids = torch.tensor([render_chat(PROMPTS[0], loaded.tokenizer)])
    with loaded.model.disable_adapter():
        plain = loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )
    expected = loaded.tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)

    assert engine.complete([Row("base@v1", PROMPTS[0])], GREEDY) == [expected]


def test_equal_model_and_seed_give_equal_text_and_another_seed_another(engine):
    first, second, other = engine.complete([Row("red@v1", PROMPTS[0], seed) for seed in (5, 5, 6)], HOT)

    assert first == second != other


def test_eight_concurrent_requests_equal_their_solo_runs(engine):
    rng = random.Random(0)
    rows = [Row(rng.choice(engine.models), rng.choice(PROMPTS), rng.randrange(100)) for _ in range(8)]

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda row: engine.complete([row], HOT)[0], rows))

    assert together == [engine.complete([row], HOT)[0] for row in rows]


def test_more_rows_than_fit_one_batch_all_come_back(loaded):
    engine = LocalEngine(loaded, max_rows=3)
    rows = [Row("blue@v1", PROMPTS[0], seed) for seed in range(8)]

    texts = engine.complete(rows, HOT)

    assert texts == [engine.complete([row], HOT)[0] for row in rows]
    engine.close()


def test_rows_stream_side_by_side_and_their_pieces_make_the_whole(engine):
    rows = (Row("red@v1", PROMPTS[0], 1), Row("blue@v1", PROMPTS[1], 1))

    events = list(engine.submit(GenerationRequest(rows, Sampling(temperature=1.0, max_new_tokens=60))))

    done = {event.row: event for event in events if isinstance(event, RowDone)}
    for row in (0, 1):
        pieces = [event.text for event in events if isinstance(event, RowDelta) and event.row == row]
        assert "".join(pieces) == done[row].text
        assert done[row].completion_tokens <= 60
        assert 0 < done[row].first_token_seconds <= done[row].seconds
    first_end = min(place for place, event in enumerate(events) if isinstance(event, RowDone))
    assert {event.row for event in events[:first_end]} == {0, 1}


def test_rows_end_at_their_stop_tokens_while_others_go_on(engine, monkeypatch):
    monkeypatch.setattr(engine, "_stops", StopTokens(list(range(100, 120))))
    rows = tuple(Row(model, PROMPTS[0], seed) for model in engine.models for seed in range(4))

    together = ended(engine.submit(GenerationRequest(rows, HOT)))

    assert len({event.completion_tokens for event in together if event.reason == "stop"}) > 2
    assert [event.text for event in together] == [engine.complete([row], HOT)[0] for row in rows]


def test_one_row_can_be_stopped_and_the_other_is_not_changed(engine, gate):
    gate.close(after=10)
    rows = (Row("red@v1", PROMPTS[0], 1), Row("blue@v1", PROMPTS[1], 1))
    sampling = Sampling(temperature=1.0, max_new_tokens=120)
    stream = engine.submit(GenerationRequest(rows, sampling))
    done = []
    for event in stream:
        if isinstance(event, RowDelta) and event.row == 0:
            stream.cancel(0)
            gate.open()
        elif isinstance(event, RowDone):
            done.append(event)
    first, second = sorted(done, key=lambda event: event.row)

    assert first.reason == "cancelled"
    assert first.completion_tokens < second.completion_tokens
    assert second.text == engine.complete([rows[1]], sampling)[0]


def test_cancel_frees_the_engine(engine, gate):
    gate.close(after=10)
    stream = engine.submit(GenerationRequest((Row("red@v1", PROMPTS[0], 1), Row("blue@v1", PROMPTS[0], 1)), LONG))
    next(iter(stream))

    stream.cancel()
    gate.open()

    # Either row may have ended by itself first; what matters is that both end long before 1500 tokens.
    assert all(event.completion_tokens < 1500 for event in ended(stream))
    assert engine.complete([Row("red@v1", PROMPTS[0], 1)], HOT)


def test_a_request_cancelled_while_it_waits_ends_before_the_batch_in_front_of_it(engine, gate):
    gate.close(after=10)
    running = engine.submit(GenerationRequest((Row("red@v1", PROMPTS[0], 3),), LONG))
    next(iter(running))
    waiting = engine.submit(GenerationRequest((Row("blue@v1", PROMPTS[0]),), LONG))

    waiting.cancel()

    [event] = ended(waiting)
    assert (event.reason, event.completion_tokens) == ("cancelled", 0)
    gate.open()
    assert any(isinstance(event, RowDelta) for event in running)
    running.cancel()
    ended(running)


def test_events_reach_asyncio_and_closing_early_cancels(engine):
    async def read_one() -> None:
        stream = engine.submit(GenerationRequest((Row("red@v1", PROMPTS[0], 3),), LONG))
        events = stream.events()
        assert isinstance(await anext(events), RowDelta)
        await events.aclose()
        assert stream.is_cancelled(0)

    async def read_all() -> list[str]:
        stream = engine.submit(GenerationRequest((Row("red@v1", PROMPTS[0], 3),), HOT))
        return [event.text async for event in stream.events() if isinstance(event, RowDone)]

    asyncio.run(read_one())
    assert asyncio.run(read_all()) == engine.complete([Row("red@v1", PROMPTS[0], 3)], HOT)


def test_an_unknown_model_fails_its_row_only(engine):
    first, second = ended(engine.submit(GenerationRequest((Row("rod@v1", PROMPTS[0]), Row("red@v1", PROMPTS[0])), HOT)))

    assert isinstance(first, RowFailure)
    assert "did you mean red@v1?" in first.message
    assert isinstance(second, RowDone)


def test_a_conversation_longer_than_the_window_fails_its_row_only(engine):
    long = [user("fox " * 3000)]

    first, second = ended(engine.submit(GenerationRequest((Row("red@v1", long), Row("red@v1", PROMPTS[0])), HOT)))

    assert isinstance(first, RowFailure)
    assert "2048" in first.message
    assert isinstance(second, RowDone)


def test_an_answer_stops_at_the_end_of_the_window(engine, loaded):
    from align.data.rendering.conversation_rows import render_chat

    prompt = [user("fox " * 1000)]
    room = 2048 - len(render_chat(prompt, loaded.tokenizer))
    assert 0 < room < 1500

    [event] = ended(engine.submit(GenerationRequest((Row("base@v1", prompt, 1),), LONG)))

    assert event.completion_tokens <= room


def test_complete_raises_for_a_failed_row(engine):
    with pytest.raises(IntegrityError, match="not one of the loaded models"):
        engine.complete([Row("red@v1", PROMPTS[0]), Row("green", PROMPTS[0])], HOT)


def test_broken_weights_fail_their_rows_and_no_others(mixed_engine, monkeypatch):
    model = mixed_engine._loaded.model
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    sound = layer.lora_B["adapter1"].weight.detach().clone()
    layer.lora_B["adapter1"].weight.data[0, 0] = float("nan")

    broken, whole = ended(
        mixed_engine.submit(GenerationRequest((Row("blue@v1", PROMPTS[0]), Row("red@v1", PROMPTS[0])), HOT))
    )

    layer.lora_B["adapter1"].weight.data.copy_(sound)
    assert isinstance(broken, RowFailure)
    assert "not finite" in broken.message
    assert isinstance(whole, RowDone)
    assert whole.text == mixed_engine.complete([Row("red@v1", PROMPTS[0])], HOT)[0]


def test_a_failing_batch_reaches_the_caller_and_leaves_the_adapters_right(tiny_base, monkeypatch):
    loaded = build_loaded_base(tiny_base)
    engine = LocalEngine(loaded)
    rows = [Row("red@v1", PROMPTS[0], 1), Row("blue@v1", PROMPTS[0], 1)]
    before = engine.complete(rows, HOT)
    with monkeypatch.context() as patch:

        def explode(*arguments, **options):
            raise RuntimeError("out of memory, say")

        patch.setattr(batch, "sample_tokens", explode)
        events = ended(engine.submit(GenerationRequest(tuple(rows), HOT)))

    after = engine.complete(rows[::-1], HOT)
    engine.close()
    assert [type(event) for event in events] == [RowFailure, RowFailure]
    assert "out of memory, say" in events[0].message
    assert after == before[::-1]
    # No hook may stay behind: they send later rows through the adapters of the failed batch.
    assert not any(module._forward_pre_hooks for module in loaded.model.modules())


def test_dora_rows_run_alone_and_say_so(mixed_engine):
    rows = [Row(model, PROMPTS[0], 1) for model in ("dora@v1", "red@v1", "base@v1")]

    texts = mixed_engine.complete(rows, HOT)

    assert texts == [mixed_engine.complete([row], HOT)[0] for row in rows]
    assert len(set(texts)) == 3
    assert mixed_engine.notes == ["dora@v1: DoRA rows run one model after the other"]


def test_facts_tell_live_adapters_from_the_base(engine):
    facts = {fact.reference: fact for fact in engine.facts}

    assert facts["base@v1"].logit_difference == 0
    assert facts["red@v1"].logit_difference > 0
    assert not any(fact.runs_alone for fact in engine.facts)


def test_an_adapter_that_changes_nothing_is_said_to(tiny_base):
    loaded = build_loaded_base(tiny_base)
    for key, parameter in loaded.model.named_parameters():
        if "lora_B.adapter1" in key:
            parameter.data.zero_()
    engine = LocalEngine(loaded)
    engine.close()

    assert engine.notes == ["blue@v1: writes exactly what its base writes"]


def test_a_base_without_adapters_is_an_engine_too(tiny_base, engine):
    from transformers import AutoTokenizer

    from align.models.adapters import BASE, LoadedBase
    from align.registry.checkpoint import read_folder

    bare = loud_base(tiny_base).eval()
    loaded = LoadedBase(bare, AutoTokenizer.from_pretrained(tiny_base), read_folder(tiny_base), {"base@v1": BASE})
    alone = LocalEngine(loaded)

    texts = alone.complete([Row("base@v1", PROMPTS[0], 4)], HOT)
    alone.close()

    assert texts == engine.complete([Row("base@v1", PROMPTS[0], 4)], HOT)


def test_closing_ends_running_waiting_and_later_rows(tiny_base):
    engine = LocalEngine(build_loaded_base(tiny_base))
    running = engine.submit(GenerationRequest((Row("red@v1", PROMPTS[0], 3),), LONG))
    next(iter(running))
    waiting = engine.submit(GenerationRequest((Row("blue@v1", PROMPTS[0]),), LONG))

    engine.close()
    later = engine.submit(GenerationRequest((Row("blue@v1", PROMPTS[0]),), LONG))

    for stream in (running, waiting, later):
        assert "closed" in ended(stream)[0].message


def test_a_model_that_cannot_run_is_refused_at_the_start(tiny_base):
    loaded = build_loaded_base(tiny_base)
    loaded.adapters["ghost@v1"] = "adapter9"

    with pytest.raises(ValueError, match="adapter9"):
        LocalEngine(loaded)


def gone() -> None:
    raise RuntimeError("the loop of the reader is closed")


@pytest.mark.parametrize("leaving", ["closed", "cancelled"])
def test_waiting_rows_end_once_although_their_reader_is_gone(tiny_base, gate, leaving):
    engine = LocalEngine(build_loaded_base(tiny_base), max_rows=1)
    gate.close(after=10)
    running = engine.submit(GenerationRequest((Row("red@v1", PROMPTS[0], 3),), LONG))
    next(iter(running))
    two = GenerationRequest((Row("blue@v1", PROMPTS[0]), Row("blue@v1", PROMPTS[1])), LONG)
    abandoned, other = engine.submit(two), engine.submit(two)
    abandoned._wake = gone

    if leaving == "cancelled":
        abandoned.cancel()
    engine._closing.set()
    gate.open()
    engine.close()

    told = [getattr(event, "message", "cancelled") for event in ended(abandoned)]
    assert all(leaving in message for message in told)
    assert abandoned._events.empty()
    assert ["closed" in event.message for event in ended(other)] == [True, True]
