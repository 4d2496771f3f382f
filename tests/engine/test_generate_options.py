from __future__ import annotations

import argparse

import pytest

from align import generate
from align.command_line import parse_options
from align.engine.options import add_model_options, add_sampling_options, precision_from, sampling_from
from align.engine.protocol import Sampling
from align.errors import UsageError


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_sampling_options(parser)
    add_model_options(parser)
    return parse_options(parser, words)


def test_every_way_to_sample_can_be_asked_for_and_the_defaults_are_those_of_the_engine():
    words = "--temperature 1.5 --top-p 0.9 --top_k 7 --min-p 0.1 --repetition_penalty 1.2 --frequency-penalty 0.3"
    words += " --presence_penalty -0.4 --max-new-tokens 5 --stop END --stop 完"

    assert sampling_from(parse(*words.split())) == Sampling(1.5, 0.9, 5, 7, 0.1, 1.2, 0.3, -0.4, ("END", "完"))
    assert sampling_from(parse()) == Sampling()


def test_what_is_out_of_range_is_told_by_name():
    with pytest.raises(UsageError, match=r"min_p=2\.0: out of range"):
        sampling_from(parse("--min_p", "2"))


def test_the_precision_can_be_asked_for():
    found = [precision_from(parse(*words)) for words in ([], ["--bf16"], ["--no-bf16", "--quantization", "nf4"])]

    assert [(each.quantization, each.bf16) for each in found] == [("none", None), ("none", True), ("nf4", False)]


@pytest.mark.parametrize("words", [["base", "--raw"], ["base", "once", "--raw", "--system", "be kind"]])
def test_a_raw_text_stands_alone(words, capsys):
    assert generate.main(words) == 2
    assert "--raw continues one text" in capsys.readouterr().err


def test_a_raw_text_is_continued(tiny_base, tmp_path, capsys, loaded):
    from transformers import AutoModelForCausalLM

    words = [str(tiny_base), "the quick", "--raw", "--temperature", "0", "--max_new_tokens", "6", "--no-bf16"]

    assert generate.main([*words, "--registry", str(tmp_path)]) == 0

    ids = loaded.tokenizer("the quick", return_tensors="pt")
    plain = AutoModelForCausalLM.from_pretrained(tiny_base).generate(**ids, max_new_tokens=6, do_sample=False)
    said = loaded.tokenizer.decode(plain[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out == generate.printable(said) + "\n"
