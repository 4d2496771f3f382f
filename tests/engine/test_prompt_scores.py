"""Prompts are scored as one pass would, by the model they name, whatever is written and read beside them."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from align.engine.local import LocalEngine
from align.engine.protocol import GenerationRequest, Row, RowDone, RowFailure, RowPrompt, Sampling
from align.schema import user

LONG = "the quick brown fox jumps over a lazy dog " * 12


def test_scores_beside_rows_that_are_written_are_those_of_one_pass(loaded):
    writing = Row("blue@v1", [user("hello")], 1, Sampling(temperature=1.0, max_new_tokens=60))
    scored = [
        Row(model, [], text=text, echo=True, prompt_logprobs=3, prompt_only=True)
        for model in ("red@v1", "blue@v1")
        for text in (LONG, "狐狸 👍")
    ]
    # The model is the engine's until its thread has ended.
    with closing(LocalEngine(loaded, prefill_chunk_tokens=32)) as engine:
        stream = engine.submit(GenerationRequest((writing,)))
        events = list(engine.submit(GenerationRequest(tuple(scored))))
        stream.cancel()

    prompts = {event.row: event for event in events if isinstance(event, RowPrompt)}
    ends = [event for event in events if isinstance(event, RowDone)]
    assert sorted(prompts) == [0, 1, 2, 3]
    assert {(end.text, end.reason, end.completion_tokens) for end in ends} == {("", "length", 0)}
    for place, row in enumerate(scored):
        tokens = prompts[place].tokens
        ids = torch.tensor([[token.id for token in tokens]])
        with torch.inference_mode():
            name = loaded.adapters[row.model]
            logprobs = loaded.model(input_ids=ids, adapter_names=[name]).logits[0, :-1].log_softmax(-1)
        for token, line in zip(tokens[1:], logprobs, strict=True):
            assert token.logprob == pytest.approx(float(line[token.id]), abs=1e-4)
            assert token.top[0].logprob == pytest.approx(float(line.max()), abs=1e-4)
            assert (token.rank == 1) == (token.top[0].id == token.id)
            assert len(token.top) == 3


def test_a_row_is_not_given_ids_that_no_vocabulary_has(engine):
    rows = tuple(Row("red@v1", [], ids=ids) for ids in ((1, 320), (-1,), ()))

    events = list(engine.submit(GenerationRequest(rows, Sampling(max_new_tokens=1))))

    assert [type(event) for event in events] == [RowFailure] * 3
    assert {event.fault for event in events} == {"prompt"}
    assert any("token 320 is none of its 320" in event.message for event in events)
