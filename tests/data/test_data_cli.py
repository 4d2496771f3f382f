from __future__ import annotations

import json
import subprocess
import sys

import pytest

from align.data.__main__ import main
from align.errors import DataError


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = [{"instruction": f"the fox {n}", "output": "over there"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*good, {"instruction": "q", "output": ""}]))
    return path


def test_list_names_every_dataset(capsys):
    assert main(["list"]) == 0
    assert {"alpaca", "gsm8k", "hh-rlhf", "votes", "world-chats"} <= {
        line.split()[0] for line in capsys.readouterr().out.splitlines()
    }


def test_a_broken_entry_of_the_catalogue_is_named_after_all_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets_cfg").mkdir()
    (tmp_path / "datasets_cfg" / "mine.yaml").write_text("sorce: rows.jsonl\n")

    assert main(["list"]) == 2

    said = capsys.readouterr()
    assert "\nvotes " in said.out
    assert "mine.yaml" in said.err
    assert "sorce" in said.err


def test_check_reports_bad_rows_and_exits_with_3(rows, tmp_path, capsys):
    code = main(["check", str(rows), "--report", str(tmp_path / "bad.jsonl")])

    told = capsys.readouterr().out
    [bad] = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert code == 3
    assert "5 rows read, 1 bad; gives 4 demonstration" in told
    assert f"{rows}:5 output: is empty; fill it in" in told
    assert bad["reason"] == "empty completion"
    assert bad["row"] == {"instruction": "q", "output": ""}


def test_check_of_sound_data_exits_with_0(rows, capsys):
    assert main(["check", f"{rows}:limit=4", "--view", "prompt"]) == 0
    assert "gives 4 prompt" in capsys.readouterr().out


def test_a_file_in_another_encoding_is_read_as_its_error_says(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"question": "几点", "answer": "九点"}\n'.encode("gb18030"))

    assert main(["check", str(path)]) == 3
    assert "data=rows.jsonl:encoding=gb18030" in capsys.readouterr().err
    assert main(["check", f"{path}:encoding=gb18030"]) == 0


def test_tracebacks_can_be_asked_for_after_the_command(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        main(["check", str(tmp_path / "rows.jsonl"), "--debug"])


def test_check_of_a_view_the_data_lacks_is_one_line(rows, capsys):
    assert main(["check", str(rows), "--view", "preference"]) == 3
    assert capsys.readouterr().err.startswith("error: rows.jsonl: asked for the view preference")


def test_check_reads_the_registry_only_where_it_is_asked_for(tmp_path, capsys):
    assert main(["check", "votes", "--registry", str(tmp_path / "registry")]) == 3
    assert "vote on the comparison page first" in capsys.readouterr().err


def test_preview_marks_trained_tokens(rows, tiny_base, tmp_path, capsys):
    options = ["--model", str(tiny_base), "--registry", str(tmp_path / "registry"), "--plain", "--rows", "2"]

    assert main(["preview", str(rows), *options]) == 0

    told = capsys.readouterr().out
    assert "<|im_start|>user\nthe fox 0<|im_end|>\n<|im_start|>assistant\n[[over there<|im_end|>]]" in told
    assert told.count("--- row") == 2


@pytest.mark.parametrize(("view", "marks"), [("prompt", 0), ("demonstration", 1)])
def test_preview_follows_the_view(rows, tiny_base, tmp_path, capsys, view, marks):
    options = ["--model", str(tiny_base), "--registry", str(tmp_path / "registry"), "--rows", "1", "--view", view]

    assert main(["preview", str(rows), *options]) == 0
    assert capsys.readouterr().out.count("[[") == marks


def test_preview_of_pairs_and_texts(tiny_base, tmp_path, capsys):
    pairs, texts = tmp_path / "pairs.jsonl", tmp_path / "texts.jsonl"
    pairs.write_text(json.dumps({"prompt": "the fox", "chosen": "here", "rejected": "there"}))
    texts.write_text(json.dumps({"text": "the lazy dog"}))
    options = ["--model", str(tiny_base), "--registry", str(tmp_path / "registry")]

    assert main(["preview", str(pairs), *options]) == 0
    assert main(["preview", str(texts), *options]) == 0

    told = capsys.readouterr().out
    assert "[[here<|im_end|>]]" in told
    assert "[[there<|im_end|>]]" in told
    assert "[[the lazy dog<|im_end|>]]" in told


def test_colour_marks_keep_the_text(tiny_base):
    from transformers import AutoTokenizer

    from align.data.preview import mark_colour

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    ids = tokenizer.encode("几点 the fox", add_special_tokens=False)
    mask = [0] * (len(ids) // 2) + [1] * (len(ids) - len(ids) // 2)

    marked = mark_colour(ids, mask, tokenizer)

    assert marked.plain.endswith("the fox")
    assert any("green" in str(span.style) for span in marked.spans)


def test_listing_and_checking_import_nothing_heavy(rows):
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'gradio'}"
    code = f"import sys; from align.data.__main__ import main; main(['list']); main(['check', {str(rows)!r}]); "
    code += f"sys.exit(str({heavy} & set(sys.modules)) if {heavy} & set(sys.modules) else 0)"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300).returncode == 0


def test_preview_tells_what_a_run_would_drop_and_why(tiny_base, tmp_path, capsys):
    path = tmp_path / "thoughts.jsonl"
    answers = [{"role": "assistant", "content": "nine"}, {"role": "assistant", "content": "ten", "thinking": "late"}]
    talks = [{"messages": [{"role": "user", "content": "when?"}, answer]} for answer in answers]
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks))

    assert main(["preview", str(path), "--model", str(tiny_base), "--registry", str(tmp_path / "registry")]) == 0

    shown = capsys.readouterr().out
    assert "1  the chat template leaves out the reasoning of the answer" in shown
    assert "ten" not in shown
