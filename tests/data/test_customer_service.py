"""Customer-service files as their authors publish them: who speaks, what is learned, what is left out and told."""

from __future__ import annotations

import csv
import json
from itertools import pairwise

import pytest
from template_zoo import build

from align.data import load_records
from align.data.rendering.render_view import render_view
from align.errors import DataError, UsageError


def rows(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return str(path)


def table(path, delimiter, *values, **options):
    with path.open("w", newline="", **options) as stream:
        writer = csv.DictWriter(stream, values[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(values)
    return str(path)


def turns(record):
    return [(turn["role"], turn["content"]) for turn in [*record.prompt, *record.completion]]


def learned(found):
    """The decoded tokens that each row trains, run by run."""
    tokenizer = build("chatml")
    texts = []
    for row in render_view("demonstration", found.records, tokenizer, 100_000).rows:
        runs, on_before = [], 0
        for token, on in zip(row["input_ids"], row["completion_mask"], strict=True):
            if on:
                runs = runs if on_before else [*runs, []]
                runs[-1].append(token)
            on_before = on
        texts.append([tokenizer.decode(run) for run in runs])
    return texts


def noted(found, text):
    return any(text in note for note in found.notes)


# Bitext


def test_bitexts_chatbot_rows_teach_the_response_with_its_placeholders(tmp_path):
    row = {"flags": "B", "instruction": "cancel {{Order Number}}", "category": "ORDER", "intent": "cancel_order",
           "response": "I have cancelled {{Order Number}}."}  # fmt: skip
    found = load_records(table(tmp_path / "bitext.csv", ",", row, encoding="utf-8-sig"))

    assert learned(found) == [["I have cancelled {{Order Number}}.<|im_end|>"]]
    assert turns(found.records[0])[0] == ("user", "cancel {{Order Number}}")
    assert found.records[0].meta == {"flags": "B", "category": "ORDER", "intent": "cancel_order"}


def test_bitexts_sample_teaches_the_intent_and_says_how_to_take_the_category(tmp_path):
    row = {"flags": "B", "utterance": "i want to cancel", "category": "ORDER", "intent": "cancel_order"}
    path = table(tmp_path / "bitext.csv", ",", row, encoding="utf-8-sig")

    found = load_records(path)

    assert learned(found) == [["cancel_order<|im_end|>"]]
    assert found.records[0].answer == "cancel_order"
    assert noted(found, "label=category behind the file takes category")
    assert load_records(f"{path}:label=category").records[0].answer == "ORDER"


@pytest.mark.parametrize("label", ["label", "category"])
def test_a_text_beside_a_label_may_be_a_document_so_the_class_is_asked_for(tmp_path, label):
    path = rows(tmp_path / "a.jsonl", {"text": "where is my card", label: "card_arrival"})

    assert noted(load_records(path), "add :format=labels")
    assert load_records(f"{path}:format=labels").records[0].answer == "card_arrival"


def test_an_intent_that_is_no_text_is_no_class(tmp_path):
    with pytest.raises(DataError, match="cannot be recognised"):
        load_records(rows(tmp_path / "a.jsonl", {"utterance": "hello", "intent": {"name": "greeting"}}))


# MultiDoGO


def test_multidogos_annotated_turns_teach_the_intent(tmp_path):
    row = {"conversationId": "a", "turnNumber": "0", "utteranceId": "<CONV>a<TURN>0", "utterance": "hi robin",
           "slot-labels": "O O", "intent": "openinggreeting"}  # fmt: skip
    found = load_records(table(tmp_path / "airline.tsv", "\t", row))

    assert learned(found) == [["openinggreeting<|im_end|>"]]


def test_multidogos_dialogues_join_their_turns_by_number(tmp_path):
    said = [("0", "customer", "hi"), ("10", "agent", "which seat?"), ("2", "customer", "a seat please"),
            ("11", "agent", "aisle?"), ("12", "customer", "yes")]  # fmt: skip
    values = [
        {"conversationId": "a", "turnNumber": number, "utteranceId": number, "utterance": text, "authorRole": who}
        for number, who, text in said
    ]
    found = load_records(table(tmp_path / "airline.tsv", "\t", *values))

    assert turns(found.records[0]) == [("user", "hi\na seat please"), ("assistant", "which seat?\naisle?")]
    assert noted(found, "2 turns follow one of the same speaker")
    assert noted(found, "1 conversations go on after the last answer")
    assert learned(found) == [["which seat?\naisle?<|im_end|>"]]


# ABCD


def abcd(*said, **more):
    return {"convo_id": 3, "scenario": {"flow": "x"}, "original": [list(turn) for turn in said], "delexed": [], **more}


def test_abcd_teaches_the_agent_and_shows_it_the_actions(tmp_path):
    said = [("agent", "hi"), ("customer", "a return"), ("agent", "your name?"), ("customer", "Ann")]
    said += [("action", "Account of Ann is open."), ("agent", "thanks"), ("agent", "all done"), ("customer", "bye")]
    found = load_records(rows(tmp_path / "abcd.jsonl", abcd(*said)))

    assert learned(found) == [["your name?<|im_end|>", "thanks\nall done<|im_end|>"]]
    assert [role for role, _ in turns(found.records[0])] == [
        "assistant", "user", "assistant", "user", "tool", "assistant",
    ]  # fmt: skip
    assert found.records[0].id == "3"
    assert found.records[0].meta == {"scenario": {"flow": "x"}}
    assert noted(found, "that copy was left out")


def test_abcds_splits_are_one_file_of_which_a_part_is_named(tmp_path):
    part = abcd(("customer", "a return"), ("agent", "your name?"))
    (tmp_path / "abcd.json").write_text(json.dumps({"train": [part, part], "dev": [part], "test": [part]}))

    found = load_records(str(tmp_path / "abcd.json"))
    assert found.rows == 2
    assert noted(found, "the list under 'train'")
    (tmp_path / "dev.yaml").write_text("source: abcd.json\nrows_at: dev\n")
    assert load_records(str(tmp_path / "dev.yaml")).rows == 1


def test_abcd_with_an_unknown_speaker_is_refused(tmp_path):
    said = [("customer", "a return"), ("robot", "your name?")]
    with pytest.raises(DataError, match=r"original\[1\]: has the unknown role 'robot'"):
        load_records(rows(tmp_path / "abcd.jsonl", abcd(*said)))


# Taskmaster, CrossWOZ, tau-bench, ChatterBot


def test_taskmaster_learns_the_assistant_alone(tmp_path):
    said = [("USER", "two mochas"), ("ASSISTANT", "ok"), ("ASSISTANT", "which milk?"), ("USER", "oat")]
    utterances = [{"index": at, "speaker": who, "text": text, "segments": []} for at, (who, text) in enumerate(said)]
    path = rows(tmp_path / "tm.jsonl", {"conversation_id": "dlg-1", "utterances": utterances})

    found = load_records(path)

    assert learned(found) == [["ok\nwhich milk?<|im_end|>"]]
    assert load_records(path, view="prompt").records[0].prompt[-1]["content"] == "oat"


def test_crosswoz_as_published_is_an_object_by_id(tmp_path):
    messages = [{"role": "usr", "content": "你好", "dialog_act": []}]
    messages += [{"role": "sys", "content": "您好", "sys_state": {}}]
    (tmp_path / "val.json").write_text(json.dumps({"391": {"goal": [], "messages": messages, "type": "单领域"}}))

    found = load_records(str(tmp_path / "val.json"))

    assert turns(found.records[0]) == [("user", "你好"), ("assistant", "您好")]
    assert found.records[0].id == "391"


def test_a_transcript_is_split_at_its_speakers(tmp_path):
    text = "user: my card\nor my key\nassistant: None\ntool: {}\nassistant: It is blocked.\n\nCall us.\nuser: ok"
    found = load_records(rows(tmp_path / "tau.jsonl", {"messages_display": text}))

    assert turns(found.records[0]) == [
        ("user", "my card\nor my key"), ("tool", "{}"), ("assistant", "It is blocked.\n\nCall us."),
    ]  # fmt: skip
    assert learned(found) == [["It is blocked.\n\nCall us.<|im_end|>"]]
    assert noted(found, "1 assistant turns are `None`")


def test_a_transcript_without_speakers_is_refused(tmp_path):
    path = rows(tmp_path / "tau.jsonl", {"messages_display": "user: a\nassistant: b"}, {"messages_display": "hello"})

    with pytest.raises(DataError, match="jsonl:2 messages_display: does not begin with a speaker"):
        load_records(path)


def test_names_before_a_colon_are_no_transcript(tmp_path):
    row = {"id": "1", "summary": "Amanda baked.", "dialogue": "Amanda: I baked cookies.\nJerry: Sure!"}

    with pytest.raises(DataError, match="cannot be recognised"):
        load_records(rows(tmp_path / "samsum.jsonl", row))
    found = load_records(f"{tmp_path}/samsum.jsonl:prompt=dialogue,completion=summary")
    assert learned(found) == [["Amanda baked.<|im_end|>"]]


@pytest.mark.parametrize(
    "name",
    [
        "abcd__abcd_sample.json", "taskmaster1_sample.json", "taskmaster4_coffee.json", "crosswoz_val_messages.json",
        "tau_retail_few_shot.jsonl", "chatterbot_en_conversations.yml", "chatterbot_zh_conversations.yml",
    ],
)  # fmt: skip
def test_real_logs_train_every_answer_to_the_user_and_nothing_else(real_data, name):
    found = load_records(f"{real_data}/customer_service/{name}:limit=40")

    for record, texts in zip(found.records, learned(found), strict=True):
        answers = [turn["content"] for turn in record.completion if turn["role"] == "assistant"]
        assert [text.removesuffix("<|im_end|>").replace(" ", "") for text in texts] == [
            answer.replace(" ", "") for answer in answers
        ]
        speakers = [turn["role"] for turn in [*record.prompt, *record.completion]]
        assert ("user", "user") not in pairwise(speakers)
        assert ("assistant", "assistant") not in pairwise(speakers)


# sentiment, summaries, translations, as public files hold them


TASK_FILES = {
    "sst2.tsv": "sentence\tlabel\na kettle of a film \t0\n",
    "banking.csv": 'text,category\n"where is it, my card?",card_arrival\n',
    "samsum.json": '[{"id": "1", "summary": "s", "dialogue": "A: b"}]',
    "cnn.csv": "id,article,highlights\n1,long news,short news\n",
    "xsum.jsonl": '{"document": "d", "summary": "s", "id": "1"}',
    "opus.jsonl": '{"id": "0", "translation": {"en": "yes", "fr": "oui"}}',
    "wmt.jsonl": '{"translation": {"de": "ja", "en": "yes"}}',
    "pairs.tsv": "English\tFrench\nyes\toui\n",
}


@pytest.mark.parametrize(
    ("name", "spec", "prompt", "completion"),
    [
        ("sst2.tsv", "glue-sst2:source={}", "a kettle of a film", "negative"),
        ("banking.csv", "banking77:source={},label=category", "where is it, my card?", "card_arrival"),
        ("samsum.json", "samsum:source={}", "A: b", "s"),
        ("cnn.csv", "{}:prompt=article,completion=highlights", "long news", "short news"),
        ("xsum.jsonl", "{}:prompt=document,completion=summary", "d", "s"),
        ("opus.jsonl", "{}:prompt=fr,completion=en", "oui", "yes"),
        ("wmt.jsonl", "opus-books-en-fr:source={},prompt=de,completion=en", "ja", "yes"),
        ("pairs.tsv", "{}:prompt=English,completion=French", "yes", "oui"),
    ],
)
def test_public_task_files_are_read_by_a_spec(tmp_path, name, spec, prompt, completion):
    (tmp_path / name).write_text(TASK_FILES[name])

    found = load_records(spec.format(tmp_path / name))

    assert prompt in found.records[0].prompt[-1]["content"]
    assert learned(found) == [[f"{completion}<|im_end|>"]]


def test_tatoebas_pairs_have_no_header_so_a_yaml_names_them(tmp_path):
    (tmp_path / "fra.txt.tsv").write_text("Go.\tVa !\tCC-BY 2.0\nHi.\tSalut !\tCC-BY 2.0\n")
    (tmp_path / "pairs.yaml").write_text(
        "source: fra.txt.tsv\nheader: [en, fr, terms]\ncolumns: {prompt: en, completion: fr}\n"
    )

    assert [text for text, in learned(load_records(str(tmp_path / "pairs.yaml")))] == [
        "Va !<|im_end|>", "Salut !<|im_end|>",
    ]  # fmt: skip


def test_a_translation_without_a_direction_is_refused(tmp_path):
    path = rows(tmp_path / "opus.jsonl", {"translation": {"en": "yes", "fr": "oui"}})

    with pytest.raises(DataError, match=r"holds en, fr, .* add :prompt=en,completion=fr behind the file"):
        load_records(path)


# personas


@pytest.mark.parametrize("text", ["You are terse.", "你是一位热情的客服。"])
def test_a_persona_is_the_system_turn_of_conversations_without_one(tmp_path, text):
    asked = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    own = {"role": "system", "content": "own"}
    path = rows(tmp_path / "a.jsonl", {"messages": asked}, {"messages": [own, *asked]})

    first, second = load_records(f"{path}:default_system={text}").records

    assert first.prompt == [{"role": "system", "content": text}, asked[0]]
    assert second.prompt == [own, asked[0]]


def test_personas_are_mixed_and_stay_apart(tmp_path):
    for name in ("kind", "terse"):
        rows(tmp_path / f"{name}.jsonl", *({"prompt": f"q{number}", "completion": name} for number in range(4)))
    members = ", ".join(f'{{name: "{name}.jsonl:default_system=You are {name}."}}' for name in ("kind", "terse"))
    (tmp_path / "desk.yaml").write_text(f"mix: [{members}]\n")

    found = load_records(str(tmp_path / "desk.yaml"))

    said = {(record.prompt[0]["content"], record.completion[0]["content"]) for record in found.records}
    assert said == {("You are kind.", "kind"), ("You are terse.", "terse")}


def test_a_persona_moves_no_row_to_the_other_side_of_a_split(tmp_path):
    path = rows(tmp_path / "a.jsonl", *({"prompt": f"question {number}", "completion": "a"} for number in range(60)))

    bare, kind = (
        [record.prompt[-1]["content"] for record in load_records(f"{path}:part=test,test_share=0.3{more}").records]
        for more in ("", ",default_system=You are kind.")
    )

    assert bare == kind
    assert 0 < len(bare) < 60


def test_raw_text_takes_no_persona(tmp_path):
    path = rows(tmp_path / "a.jsonl", {"text": "a document"})

    with pytest.raises(UsageError, match="default_system: belongs to conversations, and these rows are raw text"):
        load_records(f"{path}:default_system=You are terse.")
