from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, set_seed

from align.errors import IntegrityError
from align.models.gguf_file import convert_gguf
from tests.tiny import CHATML, tiny_tokenizer

pytest.importorskip("gguf", reason="GGUF files need align[gguf]")
from tests.tiny_gguf import write_gguf

IDS = torch.arange(3, 51).reshape(2, 24)


@pytest.fixture(scope="module")
def qwen3(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def llama():
    set_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_the_written_folder_has_the_logits_of_the_model_in_the_file(architecture, tmp_path, request):
    model = request.getfixturevalue(architecture)

    notes = convert_gguf(write_gguf(tmp_path / "tiny.gguf", model, architecture), tmp_path / "folder")

    written = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(written(IDS).logits, model(IDS).logits, atol=1e-6, rtol=1e-6)
    assert notes == []


def test_the_written_tokenizer_gives_the_tokens_the_template_and_the_ends_of_the_file(qwen3, tmp_path):
    convert_gguf(write_gguf(tmp_path / "tiny.gguf", qwen3, "qwen3"), tmp_path / "folder")

    read, original = AutoTokenizer.from_pretrained(tmp_path / "folder"), tiny_tokenizer()
    for text in ("the quick brown fox", "  two  spaces 12 345\n\n x", "你好 <|im_start|>user\nhi<|im_end|>"):
        assert read(text).input_ids == original(text).input_ids
    assert read.chat_template == CHATML
    assert read.model_max_length == 2048
    assert (read.eos_token, read.pad_token) == ("<|im_end|>", "<|pad|>")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").config
    assert (config.eos_token_id, config.pad_token_id) == (read.eos_token_id, read.pad_token_id)


def test_digits_are_cut_apart_where_the_file_names_such_a_pre_tokenizer(qwen3, tmp_path):
    from tokenizers import pre_tokenizers

    convert_gguf(write_gguf(tmp_path / "tiny.gguf", qwen3, "qwen3", pre="smollm"), tmp_path / "folder")

    split = AutoTokenizer.from_pretrained(tmp_path / "folder").backend_tokenizer.pre_tokenizer
    assert isinstance(split, pre_tokenizers.Sequence)
    # Two spaces before a digit stay together, as they do when the digit is cut off first.
    assert [piece for piece, _ in split.pre_tokenize_str("a  12")] == ["a", "ĠĠ", "1", "2"]


def test_an_unknown_pre_tokenizer_and_unread_settings_are_told(qwen3, tmp_path):
    file = write_gguf(tmp_path / "t.gguf", qwen3, "qwen3", pre="new-one", qwen3__attention__scale=0.123)

    notes = "\n".join(convert_gguf(file, tmp_path / "folder"))

    assert "pre-tokenizer 'new-one' is not known here" in notes
    assert "not read from it: qwen3.attention.scale=0.123" in notes


def test_a_second_end_of_turn_stops_answers(qwen3, tmp_path):
    from transformers import GenerationConfig

    file = write_gguf(tmp_path / "t.gguf", qwen3, "qwen3", tokenizer__ggml__eot_token_id=1)

    convert_gguf(file, tmp_path / "folder")

    assert GenerationConfig.from_pretrained(tmp_path / "folder").eos_token_id == [2, 1]


def test_scaled_positions_that_transformers_drops_are_refused(llama, tmp_path):
    factors = {"rope_freqs.weight": torch.ones(4)}
    with pytest.raises(IntegrityError, match="its positions are scaled"):
        convert_gguf(write_gguf(tmp_path / "a.gguf", llama, "llama", factors), tmp_path / "a")

    scaled = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    with pytest.raises(IntegrityError, match=r"its positions are scaled \(rope linear\)"):
        convert_gguf(write_gguf(tmp_path / "b.gguf", llama, "llama", **scaled), tmp_path / "b")


def test_tensors_that_transformers_leaves_out_are_refused(llama, tmp_path):
    more = {"blk.0.attn_extra.weight": torch.ones(7)}

    with pytest.raises(IntegrityError, match=r"holds .* numbers, the model that transformers makes of it"):
        convert_gguf(write_gguf(tmp_path / "a.gguf", llama, "llama", more), tmp_path / "a")


def test_a_special_token_outside_the_vocabulary_is_refused(qwen3, tmp_path):
    with pytest.raises(IntegrityError, match="eos_token_id"):
        convert_gguf(write_gguf(tmp_path / "a.gguf", qwen3, "qwen3", eos=5000), tmp_path / "a")


@pytest.mark.parametrize(
    "content", [b"", b"GG", b"PK\x03\x04zip", b"GGUF" + bytes(40), b"GGUF\x03\0\0\0" + b"\xff" * 90]
)
def test_a_file_that_is_no_gguf_or_torn_is_refused_with_its_name(content, tmp_path):
    (tmp_path / "broken.gguf").write_bytes(content)

    with pytest.raises(IntegrityError, match=r"broken\.gguf: (no GGUF file|cannot be read)"):
        convert_gguf(tmp_path / "broken.gguf", tmp_path / "folder")


def test_a_file_cut_off_within_its_tensors_is_refused(qwen3, tmp_path):
    file = write_gguf(tmp_path / "whole.gguf", qwen3, "qwen3")
    file.write_bytes(file.read_bytes()[:-4096])

    with pytest.raises(IntegrityError, match=r"whole\.gguf: cannot be read"):
        convert_gguf(file, tmp_path / "folder")


def test_an_architecture_that_transformers_does_not_read_is_not_told_to_be_downloaded_again(llama, tmp_path):
    file = write_gguf(tmp_path / "new.gguf", llama, "novel")

    with pytest.raises(IntegrityError, match=r"novel is not supported yet\.\); give the model's safetensors folder"):
        convert_gguf(file, tmp_path / "folder")
