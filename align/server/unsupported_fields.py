"""The fields of a request that this server does not support: refused by name where they would change the answer.

Servers that silently ignore what they do not know answer another question than was asked. So every field is honoured,
known to change nothing, or refused; an unknown one is refused with the nearest name, as OpenAI's own API does.
"""

from __future__ import annotations

from typing import Any

from align.errors import nearest
from align.server.api_errors import bad_field, unsupported
from align.server.request_messages import ApiObject

_IGNORED = frozenset([
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "request_id", "cache_salt", "cache_prompt", "id_slot", "keep_alive", "include_usage", "timings_per_token",
    "return_progress", "stream_interval",
])  # fmt: skip
"""no answer depends on them"""

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys([
        "functions", "audio", "prediction", "web_search_options", "documents", "mm_processor_kwargs", "image_data",
        "suffix", "logits_processors", "prompt_logprobs", "bad_words", "truncate_prompt_tokens", "truncate", "details",
        "decoder_input_details", "top_n_tokens", "watermark", "use_beam_search", "beam_width", "early_stopping",
        "lora_request", "lora", "lora_path", "adapter_id", "chat_template", "structural_tag", "guided_decoding_backend",
        "guided_whitespace_pattern", "kv_transfer_params", "vllm_xargs", "return_token_ids",
        "return_tokens_as_token_ids", "return_hidden_states", "custom_logit_processor", "session_params", "stop_regex",
        "no_stop_trim", "grammar_lazy", "grammar_triggers", "n_probs", "post_sampling_probs", "samplers",
        "dry_sequence_breakers", "t_max_predict_ms", "logprob_token_ids", "forced_bos_token_id", "n_indent",
        "negative_prompt", "cfg_scale", "penalty_alpha", "echo", "moderation", "add_special_tokens", "return_full_text",
        "mirostat_tau", "mirostat_eta", "dynatemp_exponent", "xtc_threshold", "dry_base", "dry_allowed_length",
        "dry_penalty_last_n", "repeat_last_n",
    ], ()),
    "function_call": ("none", "auto"), "modalities": (["text"],), "verbosity": ("medium",), "length_penalty": (1, 1.0),
    "num_beams": (1,), "do_sample": (True,), "priority": (0,), "spaces_between_special_tokens": (True,),
    "include_reasoning": (True,), "separate_reasoning": (True,), "typical_p": (1, 1.0), "tfs_z": (1, 1.0),
    "top_a": (0, 0.0), "epsilon_cutoff": (0, 0.0), "eta_cutoff": (0, 0.0), "mirostat": (0,), "mirostat_mode": (0,),
    "dynatemp_range": (0, 0.0), "smoothing_factor": (0, 0.0), "xtc_probability": (0, 0.0), "dry_multiplier": (0, 0.0),
    "n_keep": (0,), "min_keep": (0,), "no_repeat_ngram_size": (0,),
}  # fmt: skip
"""fields of OpenAI, vLLM, SGLang, TGI and llama.cpp, with the values that ask for nothing"""

_ADVICE = {
    "bad_words": "ban single tokens with logit_bias",
    "chat_template": "the model's own template is used; its variables are set with chat_template_kwargs",
    **dict.fromkeys(["n_predict", "max_new_tokens", "max_length"], "use max_tokens"),
    **dict.fromkeys(["repeat_penalty", "penalty_repeat"], "use repetition_penalty"),
    "stop_sequences": "use stop",
    "eos_token_id": "use stop_token_ids",
    "num_return_sequences": "use n",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "regex": "use guided_regex",
    "enable_thinking": "put it into chat_template_kwargs",
    **dict.fromkeys(
        ["thinking", "thinking_budget", "think", "reasoning"],
        "put what the chat template reads into chat_template_kwargs",
    ),
    **dict.fromkeys(["options", "parameters"], "send what is in it as fields of their own"),
    "extra_body": "it is the client's word; send what is in it as fields of their own",
    "inputs": "use prompt, or messages",
    "truncate_prompt_tokens": "send a shorter prompt",
    **dict.fromkeys(["lora_request", "lora_path", "lora", "adapter_id"], "name the adapter in model; see /v1/models"),
    "use_beam_search": "use temperature=0 for the likeliest tokens one by one",
}
"""what to do instead of a field, whether other servers have it or not"""


def check_extras(body: ApiObject, prefix: str = "") -> None:
    """Raise ApiError for the first extra field that is neither ignored nor asks for nothing."""
    for name, value in (body.model_extra or {}).items():
        if name in _IGNORED or value is None:
            continue
        path = f"{prefix}{name}"
        if name in _UNSUPPORTED:
            harmless = any(value == one and type(value) is type(one) for one in _UNSUPPORTED[name])
            if not (harmless or value is False or value in ("", [], {})):
                raise unsupported(path, "not done by this server", _ADVICE.get(name, "leave it out"))
        elif name in _ADVICE:
            raise unsupported(path, "not a field of this server", _ADVICE[name])
        else:
            about = nearest(name, [*type(body).model_fields, *_UNSUPPORTED])
            raise bad_field(path, f"unknown field;{about}", code="unknown_parameter")
