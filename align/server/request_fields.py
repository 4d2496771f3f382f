"""The fields of a request that servers name in their own ways: those that state a form, and those not supported here.

Servers that silently ignore what they do not know answer another question than was asked. So every field is honoured,
known to change nothing, or refused by name; an unknown one is refused with the nearest name, as OpenAI's own API does.
The form of an answer is stated by `response_format` (OpenAI), `structured_outputs` and, before, `guided_*` (vLLM),
`regex` and `json_schema` (SGLang), `grammar` and `json_schema` (llama.cpp).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from align.engine.constraint import Constraint, check_constraint, require_llguidance
from align.errors import UsageError, nearest
from align.server.api_errors import ApiError, bad_field, unsupported
from align.server.request_messages import ApiObject

_ANY_OBJECT = {"type": "object"}
_KINDS = ("json", "json_object", "regex", "choice", "grammar")


class ConstraintFields(ApiObject):
    """The fields that constrain the form of an answer."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    json_schema: Any = None
    regex: str | None = None
    grammar: Any = None

    def constraint(self) -> tuple[str, Constraint] | None:
        """Return the field that states a constraint, and the constraint; raises ApiError for several or unsupported."""
        values = ((name, getattr(self, name)) for name in _READERS)
        read = ((name, _READERS[name](name, value)) for name, value in values if value is not None)
        stated = [(name, constraint) for name, constraint in read if constraint is not None]
        if len(stated) > 1:
            names = " and ".join(name for name, _ in stated)
            raise bad_field(stated[1][0], f"{names} both state a form; give one of them")
        if not stated:
            return None
        try:
            require_llguidance()
        except UsageError as error:
            raise unsupported(stated[0][0], str(error), "or leave it out") from None
        return stated[0]

    def check_constraint(self) -> None:
        """Raise ApiError when the constraint cannot be compiled; this may take a second."""
        if (stated := self.constraint()) is None:
            return
        name, constraint = stated
        try:
            check_constraint(constraint)
        except UsageError as error:
            raise bad_field(name, str(error), code="invalid_value") from None


def _from_response_format(name: str, value: dict[str, Any]) -> Constraint | None:
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _from_schema(name, value.get("schema", _ANY_OBJECT))
    if kind == "json_schema":
        inner = value.get("json_schema")
        if not isinstance(inner, dict) or "schema" not in inner:
            raise ApiError(400, f"{name}.json_schema: it has no schema; send {{name, schema}}", param=name)
        return _from_schema(name, inner["schema"])
    raise unsupported(name, f"type {kind!r} is not done by this server", "give text, json_object or json_schema")


def _from_structured_outputs(name: str, value: dict[str, Any]) -> Constraint | None:
    if not value:
        return None
    stated = {key: item for key, item in value.items() if item not in (None, False)}
    if len(stated) != 1 or not stated.keys() <= {*_KINDS}:
        advice = f"give one of {', '.join(_KINDS)}"
        raise unsupported(name, f"it has {', '.join(stated) or 'nothing'}", advice)
    ((key, inner),) = stated.items()
    if key in ("json", "json_object"):
        return _from_schema(name, _ANY_OBJECT if key == "json_object" else inner)
    if key == "choice":
        return _from_choice(name, inner)
    return Constraint("regex" if key == "regex" else "grammar", _check_text(name, inner))


def _from_grammar(name: str, value: Any) -> Constraint:
    """Return a grammar given as text, or as in Text Generation Inference: {type: json or regex, value}."""
    match value:
        case {"type": "json" | "json_schema", **rest}:
            inner = rest.get("value")
            return _from_schema(name, inner.get("schema", inner) if isinstance(inner, dict) else inner)
        case {"type": "regex", **rest}:
            return Constraint("regex", _check_text(name, rest.get("value")))
    return Constraint("grammar", _check_text(name, value))


def _from_schema(name: str, schema: Any) -> Constraint:
    """Return the constraint of a JSON schema, given as an object or as text."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            schema = None
    if not isinstance(schema, dict | bool):
        raise bad_field(name, "not a JSON schema; send an object")
    try:
        return Constraint("json_schema", json.dumps(schema))
    except RecursionError:
        raise bad_field(name, "nested too deeply; send a flatter one") from None


def _from_choice(name: str, texts: Any) -> Constraint:
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise bad_field(name, "not a list of texts, none of them empty; send one")
    return Constraint("choice", json.dumps(texts))


def _check_text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise bad_field(name, "not a text; send one")
    return value


_READERS: dict[str, Callable[[str, Any], Constraint | None]] = {
    "response_format": _from_response_format,
    "structured_outputs": _from_structured_outputs,
    **dict.fromkeys(["guided_json", "json_schema"], _from_schema),
    **dict.fromkeys(["guided_regex", "regex"], lambda _, pattern: Constraint("regex", pattern)),
    "guided_choice": _from_choice,
    "guided_grammar": lambda _, text: Constraint("grammar", text),
    "grammar": _from_grammar,
}
"""by field; None where the field states nothing"""

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
