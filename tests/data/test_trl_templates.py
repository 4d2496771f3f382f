"""What each chat template that ships with TRL makes of a conversation: kept, refused, or told, never lost unsaid."""

from __future__ import annotations

import itertools

import pytest
from trl_templates import ASKED, CALL, NAMES, RESULT, TALKS, TOOLS, build, say

from align.data.rendering import omissions
from align.data.rendering.answer_rows import preference_rows, unpaired_rows
from align.data.rendering.conversation_rows import demonstration_rows, prompt_rows, render_chat
from align.data.rendering.fit_length import LengthLimit
from align.data.rendering.render_view import document_rows
from align.data.rendering.rendered_rows import UNPROMPTED, UNTRAINED
from align.data.rendering.template_notices import generation_notice
from align.errors import DataError
from align.schema import Record

# kept      all that the trained turns say is trained
# context   told: turns whose reasoning the template drops are not trained, the others are kept
# prompt    told: kept, behind another prompt than generation gives
# -WHAT     refused and counted: the template leaves that out
# refused   refused and counted: by the template itself
# unusable  refused as a template: no control token ends an answer
TABLE = """
template                         system      calls       reasoning   inline      mention     whole
cohere                           kept        refused     -reasoning  kept        kept        refused
cohere2                          kept        refused     -reasoning  kept        kept        refused
cohere2_training                 kept        refused     -reasoning  kept        kept        refused
cohere_training                  kept        refused     -reasoning  kept        kept        refused
deepseek_r1_distill              prompt      -calls      -reasoning  -reasoning  -before     -calls
deepseek_r1_distill_training     prompt      -calls      kept        kept        prompt      -calls
deepseekv3                       prompt      -tools      -reasoning  -reasoning  -before     -tools
deepseekv3_training              prompt      -tools      -reasoning  -reasoning  -before     -tools
diffusion_gemma                  kept        kept        kept        kept        kept        context
diffusion_gemma_training         kept        kept        kept        kept        kept        context
gemma                            refused     refused     -reasoning  kept        kept        refused
gemma3                           kept        refused     -reasoning  kept        kept        refused
gemma3_training                  kept        refused     -reasoning  kept        kept        refused
gemma4                           kept        kept        -reasoning  kept        kept        -reasoning
gemma4_v2                        kept        kept        -reasoning  kept        kept        -reasoning
gemma4_v3                        kept        kept        -reasoning  kept        kept        -reasoning
gemma4_v4                        kept        kept        -reasoning  kept        kept        -reasoning
gemma4_v5                        kept        kept        kept        kept        kept        context
gemma_training                   refused     refused     -reasoning  kept        kept        refused
glm4moe                          unusable    unusable    unusable    unusable    unusable    unusable
glm4moe_training                 kept        kept        kept        kept        -before     context
gptoss                           kept        kept        kept        kept        kept        context
gptoss_training                  kept        kept        kept        kept        kept        context
idefics3                         kept        -calls      -reasoning  kept        kept        -calls
idefics3_training                kept        -calls      -reasoning  kept        kept        -calls
lfm2                             kept        -calls      -reasoning  kept        kept        -calls
lfm2_2_5                         kept        kept        kept        kept        kept        context
lfm2_2_5_v2                      kept        kept        kept        kept        kept        context
lfm2_2_5_vl                      kept        kept        kept        kept        kept        context
lfm2_training                    kept        -calls      -reasoning  kept        kept        -calls
lfm2_v2                          kept        kept        -reasoning  kept        kept        -reasoning
lfm2_v2_training                 kept        kept        -reasoning  kept        kept        -reasoning
llama3                           kept        -calls      -reasoning  kept        kept        -calls
llama3_1                         kept        kept        -reasoning  kept        kept        -reasoning
llama3_2                         kept        kept        -reasoning  kept        kept        -reasoning
llama3_training                  kept        -calls      -reasoning  kept        kept        -calls
llava_next                       kept        refused     -reasoning  kept        kept        refused
llava_next_training              kept        refused     -reasoning  kept        kept        refused
muse_glimmer                     kept        kept        kept        kept        kept        kept
muse_glimmer_training            kept        kept        kept        kept        kept        kept
nemotron_3_5_lightning           prompt      prompt      kept        kept        prompt      context
nemotron_3_5_lightning_training  prompt      prompt      kept        kept        prompt      context
nemotron_3_nano                  prompt      prompt      kept        kept        prompt      context
nemotron_3_nano_training         prompt      prompt      kept        kept        prompt      context
nemotron_3_super                 prompt      prompt      kept        kept        prompt      context
nemotron_3_super_training        prompt      prompt      kept        kept        prompt      context
nemotron_3_ultra                 prompt      prompt      kept        kept        prompt      context
nemotron_3_ultra_training        prompt      prompt      kept        kept        prompt      context
phi3                             kept        -calls      -reasoning  kept        kept        -calls
phi3_5                           kept        -calls      -reasoning  kept        kept        -calls
phi3_5_training                  kept        -calls      -reasoning  kept        kept        -calls
phi3_training                    kept        -calls      -reasoning  kept        kept        -calls
qwen2_5                          kept        kept        -reasoning  kept        kept        -reasoning
qwen2_5_training                 kept        kept        -reasoning  kept        kept        -reasoning
qwen2_5_vl                       kept        -calls      -reasoning  kept        kept        -calls
qwen2_5_vl_training              kept        -calls      -reasoning  kept        kept        -calls
qwen3                            kept        kept        kept        kept        -before     context
qwen3_5_nothink                  kept        kept        -reasoning  -reasoning  -before     -reasoning
qwen3_5_nothink_training         kept        kept        -reasoning  -reasoning  -before     -rewritten
qwen3_5_think                    kept        kept        kept        kept        -before     context
qwen3_5_think_training           kept        kept        kept        kept        -before     kept
qwen3_6                          kept        kept        kept        kept        -before     context
qwen3_6_training                 kept        kept        kept        kept        -before     kept
qwen3_8                          kept        kept        kept        kept        kept        kept
qwen3_8_training                 kept        kept        kept        kept        kept        kept
qwen3_instruct_2507              kept        kept        -reasoning  kept        kept        -reasoning
qwen3_instruct_2507_training     kept        kept        -reasoning  kept        kept        -reasoning
qwen3_training                   kept        kept        kept        kept        -before     kept
qwen3_vl                         kept        kept        -reasoning  kept        kept        -reasoning
qwen3_vl_training                kept        kept        -reasoning  kept        kept        -reasoning
smolvlm                          kept        -calls      -reasoning  kept        kept        -calls
smolvlm_training                 kept        -calls      -reasoning  kept        kept        -calls
"""
COLUMNS, *LINES = [line.split() for line in TABLE.strip().splitlines()]
EXPECTED = {name: dict(zip(COLUMNS[1:], outcomes, strict=True)) for name, *outcomes in LINES}
WORDS = {
    omissions.TEXT: "-text", omissions.TOOLS: "-tools", omissions.CALLS: "-calls", omissions.RESULTS: "-results",
    omissions.REASONING: "-reasoning", omissions.BEFORE_CLOSE: "-before",
    "the chat template rewrites what the assistant says": "-rewritten",
}  # fmt: skip


def outcome(rendered) -> str:
    """One word for what became of a conversation."""
    for reason in rendered.dropped:
        return "refused" if reason.startswith("refused by the chat template") else WORDS[reason]
    return {(): "kept", (UNTRAINED,): "context", (UNPROMPTED,): "prompt"}[tuple(rendered.noted)]


def test_the_table_has_every_template_of_trl():
    assert list(EXPECTED) == NAMES


@pytest.mark.parametrize("name", EXPECTED)
def test_what_each_template_keeps_refuses_or_is_told_of(name):
    tokenizer = build(name)
    found = {}
    for kind, record in TALKS.items():
        try:
            rendered = demonstration_rows([record], tokenizer, LengthLimit(4000))
        except DataError:
            found[kind] = "unusable"
            continue
        found[kind] = outcome(rendered)
        if rendered.rows:
            assert_trained(record, rendered.rows[0], tokenizer, all_turns=found[kind] != "context")

    assert found == EXPECTED[name]


def assert_trained(record, row, tokenizer, *, all_turns: bool) -> None:
    """What the last turn says (or every turn) stands in the decoded trained tokens, whatever the check itself says."""
    trained = "".join(tokenizer.decode(list(itertools.compress(row["input_ids"], row["completion_mask"]))).split())
    turns = [turn for turn in record.completion if turn["role"] == "assistant"]
    for turn in turns if all_turns else turns[-1:]:
        function = turn.get("tool_calls", [{"function": {"name": "", "arguments": {}}}])[0]["function"]
        words = [turn["content"], turn.get("reasoning_content", ""), function["name"], *function["arguments"].values()]
        opened = tokenizer.decode(row["input_ids"]).count("<think>\n")  # by the prompt, where generation opens it too
        for word in words:
            plain = "".join(word.split())
            assert plain in trained or (opened and plain.removeprefix("<think>") in trained)


def test_a_template_that_opens_reasoning_in_generation_alone_is_told_with_a_remedy():
    opening = {name for name in NAMES if EXPECTED[name]["system"] == "prompt"}

    notes = {name: generation_notice(build(name)) for name in NAMES if EXPECTED[name]["system"] != "unusable"}

    assert {name for name, note in notes.items() if note} == opening
    assert "{%- set enable_thinking = false %} at the top of chat_template.jinja" in notes["nemotron_3_nano"]
    assert "take what opens reasoning out of the end of chat_template.jinja" in notes["deepseekv3"]


@pytest.mark.parametrize("name", ["nemotron_3_nano", "nemotron_3_super"])
def test_the_remedy_makes_the_trained_prompt_the_generated_one(name):
    tokenizer = build(name)
    tokenizer.chat_template = "{%- set enable_thinking = false %}" + tokenizer.chat_template

    assert generation_notice(tokenizer) is None
    assert demonstration_rows([TALKS["system"]], tokenizer, LengthLimit(4000)).noted == {}


def test_reasoning_and_arguments_reach_the_template_in_the_form_it_asks_for():
    """DeepSeek's takes the arguments of a call as text, TRL's variant of R1's takes reasoning inside the content."""
    answer = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    record = TALKS["calls"]
    without_definitions = type(record)(prompt=record.prompt, completion=[answer])

    [row] = demonstration_rows([without_definitions], build("deepseekv3"), LengthLimit(4000)).rows
    [other] = demonstration_rows([TALKS["reasoning"]], build("deepseek_r1_distill_training"), LengthLimit(4000)).rows

    assert '{"city": "Oslo"}' in build("deepseekv3").decode(row["input_ids"])
    assert "<think>\nthe sky is grey\n</think>\n\nYes." in build("deepseek_r1_distill_training").decode(
        other["input_ids"]
    )


@pytest.mark.parametrize(
    ("render", "record"),
    [
        (preference_rows, Record(prompt=[ASKED], chosen=[say("", tool_calls=[CALL])], rejected=[say("No.")])),
        (preference_rows, Record(prompt=[ASKED], chosen=[say("Yes.")], rejected=[say("", tool_calls=[CALL])])),
        (unpaired_rows, Record(prompt=[ASKED], completion=[say("", tool_calls=[CALL])], label=True)),
        (prompt_rows, Record(prompt=[ASKED, say("", tool_calls=[CALL]), RESULT])),
        (document_rows, TALKS["calls"]),
    ],
)
def test_every_view_refuses_a_row_whose_calls_the_template_does_not_write(render, record):
    rendered = render([record], build("phi3"), LengthLimit(4000))

    assert rendered.rows == []
    assert rendered.dropped == {omissions.CALLS: 1}


def test_a_prompt_to_answer_is_refused_where_the_template_drops_tools_or_their_results():
    tokenizer = build("phi3")

    with pytest.raises(DataError, match="leaves out the tool definitions"):
        render_chat([ASKED], tokenizer, TOOLS)
    with pytest.raises(DataError, match="leaves out tool results"):
        render_chat([ASKED, say("I look."), RESULT], tokenizer)


def test_the_answers_of_a_pair_keep_their_reasoning_or_the_pair_is_refused():
    pair = Record(prompt=[ASKED], chosen=[say("Yes.", "the sky is grey")], rejected=[say("No.", "no cloud")])

    kept, refused = (preference_rows([pair], build(name), LengthLimit(4000)) for name in ("qwen3", "qwen2_5"))

    assert "<think>\nthe sky is grey\n</think>" in build("qwen3").decode(kept.rows[0]["chosen_ids"])
    assert refused.dropped == {omissions.REASONING: 1}


def test_a_judge_reads_an_answer_without_the_reasoning_that_the_template_drops():
    record = Record(prompt=[ASKED], completion=[say("<think>\nthe sky is grey\n</think>\n\nYes.")], label=True)

    assert len(unpaired_rows([record], build("deepseekv3"), LengthLimit(4000, ignore_lost_reasoning=True)).rows) == 1
