"""The fast path below TRL's call: a batch as one row, every shared prefix computed once and nothing padded.

TRL asks a model for the log-probabilities of labels (`fused_lm_head=True`), or a reward model for scores. What happens
below that call is ours: sequences are packed, each attends to itself only, the head is applied to trained positions,
and the answers are put back where TRL expects them. Its trainers, losses and metrics stay what they are.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from align.models.fused_layers import Switch, fuse_layers
from align.models.head_scores import score_tokens
from align.models.prefixes import SMALL, PackedBatch, pack, pair_keys, prompt_keys, token_rows

ATTENTION = "align_packed"
_PATH = "align_fast_path"

FAMILIES = {
    "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "mixtral", "opt", "phi", "phi3", "qwen2", "qwen3",
    "qwen3_moe",
}  # fmt: skip
"""model types whose attention is plain and whose positions are given: the ones this is tested with"""

_CHANGES_LOGITS = {
    "final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier",
}  # fmt: skip

_CLOSE = {"float32": 1e-4, "other": 3e-2}
"""of single precision the largest difference, of any other the mean one: over 30 layers in bf16 the stock path differs
from itself under other padding by up to 0.12, and by 0.012 on average; a row that sees another row by 0.3 on average"""
_IGNORABLE = {"use_cache", "return_dict", "margin", "num_items_in_batch"}
_SEQUENCE_STARTS = "cu_seq_lens_q"
_OF_PACKING = {"position_ids", _SEQUENCE_STARTS, "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


@dataclass
class FastPath:
    """The packed forward of one model, beside its stock one."""

    model: Any
    stock: Callable[..., Any]
    fused: Switch
    print_line: Callable[[str], None]
    temperature: float = 1.0
    """what the logits are divided by"""
    proved: bool = False
    active: bool = True
    shares_prefixes: bool = True
    """what several sequences begin with is computed once; off for ablations only"""
    slopes_forward: bool = True
    """a frozen head forms its gradient in the forward pass; off for ablations only"""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """Return what the model's own forward returns, computed packed where that is possible."""
        # PEFT names every argument, also those nobody gave.
        inputs = {key: value for key, value in inputs.items() if value is not None}
        if args or not self.active or not self._takes(inputs):
            return self.stock(*args, **inputs)
        if not self.proved:
            self._prove(inputs)
            if not self.active:
                return self.stock(**inputs)
        return self._packed(inputs)

    def _takes(self, inputs: dict[str, Any]) -> bool:
        """Return whether this call asks for scores of given tokens, with nothing in it that packing would lose."""
        wants_scores = inputs.get("fused_lm_head", False) if self._has_head else inputs.get("labels") is None
        taken = {"input_ids", "attention_mask", "labels", "fused_lm_head", *_IGNORABLE}
        taken |= _OF_PACKING if _SEQUENCE_STARTS in inputs else set()
        return bool(wants_scores) and inputs.keys() <= taken and _fits_window(self.model, inputs["input_ids"].shape[1])

    @property
    def _has_head(self) -> bool:
        return not hasattr(self.model, "score")

    def _packed(self, inputs: dict[str, Any]) -> Any:
        ids, labels = inputs["input_ids"], inputs.get("labels")
        sequences = token_rows(ids, inputs.get("attention_mask"), labels, inputs.get(_SEQUENCE_STARTS))
        if self.shares_prefixes:
            packed = pack(sequences, prompt_keys(sequences) if self._has_head else pair_keys(sequences), ids.device)
        else:
            packed = pack(sequences, list(range(len(sequences))), ids.device)
        hidden = self.model.base_model(**backbone_inputs(packed)).last_hidden_state[0]  # (T, H)
        if self._has_head:
            return self._token_scores(hidden, packed, labels)
        from transformers.modeling_outputs import SequenceClassifierOutputWithPast

        return SequenceClassifierOutputWithPast(logits=self.model.score(hidden[packed.last]))

    def _token_scores(self, hidden: Tensor, packed: PackedBatch, labels: Any) -> Any:
        from trl.trainer.utils import FusedCausalLMOutput

        head = self.model.get_output_embeddings()
        frozen = self.slopes_forward and not head.weight.requires_grad
        # The head has no bias where this is not 1, so the states may be divided in place of the logits.
        states = hidden[packed.sources] if self.temperature == 1 else hidden[packed.sources] / self.temperature
        scores = score_tokens(head, states, packed.targets, frozen=frozen)
        targets, places = labels[:, 1:], (packed.rows, packed.columns)
        spread = {
            name: values.new_zeros(targets.shape).index_put(places, values) for name, values in scores._asdict().items()
        }
        loss = -scores.log_probs.sum() / max(len(packed.targets), 1)
        return FusedCausalLMOutput(loss=loss, label_mask=targets != -100, **spread)

    def _prove(self, inputs: dict[str, Any]) -> None:
        """Compare the shortest rows of the first batch with the stock path; step aside for good when they differ."""
        inputs = _shortest(inputs)
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            self.fused.on = False
            stock = self.stock(**inputs)
            self.fused.on = True
            ours = self._packed(inputs)
        self.model.train(training)
        self.proved = True
        if lost := [key for key in stock if ours.get(key) is None]:
            self._step_aside(f"it does not give {', '.join(lost)}, which is asked for")
            return
        field = "log_probs" if self._has_head else "logits"
        expected, computed = getattr(stock, field).float(), getattr(ours, field).float()
        differences = (expected - computed).abs() / (1 + expected.abs())
        if self._has_head:
            differences = differences[stock.label_mask]
        # nf4 weights lie packed in bytes and are multiplied in single precision
        types_of_weights = {parameter.dtype for parameter in self.model.parameters()}
        exact = types_of_weights <= {torch.float32, torch.uint8} and not torch.is_autocast_enabled(expected.device.type)
        difference = float(differences.max() if exact else differences.mean())
        if difference > _CLOSE["float32" if exact else "other"]:
            self._step_aside(f"the first batch differs from the stock path by {difference:.1e}")

    def _step_aside(self, why: str) -> None:
        self.active = self.fused.on = False
        self.print_line(f"fast path: {why}; the stock path is used")


def _shortest(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the pair of rows (one of each half of the batch) with the fewest tokens; a packed batch stays."""
    mask = inputs.get("attention_mask")
    if mask is None or len(mask) < 2 or len(mask) % 2:
        return inputs
    half = len(mask) // 2
    row = int((mask[:half].sum(1) + mask[half:].sum(1)).argmin())
    batched = {key: value for key, value in inputs.items() if getattr(value, "shape", ())[:1] == mask.shape[:1]}
    return inputs | {key: value[[row, row + half]] for key, value in batched.items()}


def use_fast_path(model: Any, print_line: Callable[[str], None], temperature: float = 1.0) -> FastPath | None:
    """Let a model (bare or under PEFT) compute packed batches; None, and a printed reason, where it cannot.

    A model that does already is left as it is. Call it after a TRL trainer was built around the model, so that what
    TRL put on the model is what is stepped into.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if _PATH in vars(base):
        return vars(base)[_PATH]
    kind, head = base.config.model_type, base.get_output_embeddings()
    why = None
    if kind not in FAMILIES or not _logits_are_plain(base):
        why = f"for {kind} models"
    elif head is not None and "forward" in vars(head):
        why = "with a head that computes in its own way (cast_lm_head_to_fp32)"
    elif temperature != 1 and head.bias is not None:
        why = f"with temperature={temperature:g} over a head with a bias"
    if why is not None:
        print_line(f"fast path: not {why}; the stock path is used")
        return None
    _use_packed_attention(base)
    path = FastPath(base, base.forward, fuse_layers(base), print_line, temperature)
    base.forward = types.MethodType(lambda _self, *args, **inputs: path.forward(*args, **inputs), base)
    object.__setattr__(base, _PATH, path)
    return path


def accepts_packed_rows(model: Any, longest: int) -> bool:
    """Let the backbone of a model take `backbone_inputs`; False where it cannot with sequences of so many tokens."""
    if model.config.model_type not in FAMILIES or not _fits_window(model, longest):
        return False
    _use_packed_attention(model)
    return True


def _fits_window(model: Any, length: int) -> bool:
    window = getattr(model.config, "sliding_window", None)
    return window is None or length <= window


def backbone_inputs(packed: PackedBatch) -> dict[str, Any]:
    """Return the arguments with which a backbone computes the hidden states (1, T, H) of a packed row."""
    # A mask of four dimensions is passed on as it is, so none is built; our attention reads `packed` in its place.
    no_mask = packed.ids.new_zeros((1, 1, 1, 1))
    return {
        "input_ids": packed.ids, "position_ids": packed.positions, "attention_mask": no_mask, "use_cache": False,
        "packed": packed,
    }  # fmt: skip


def plain_head(model: Any) -> nn.Linear | None:
    """Return the frozen language head of a model whose logits are its product and nothing more, else None."""
    head = model.get_output_embeddings()
    frozen = isinstance(head, nn.Linear) and not head.weight.requires_grad
    return head if frozen and _logits_are_plain(model) else None


def _logits_are_plain(model: Any) -> bool:
    return all(getattr(model.config, name, None) is None for name in _CHANGES_LOGITS)


def _use_packed_attention(model: Any) -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(ATTENTION)


def packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return the attention of a packed row, (1, heads, T, d): a continuation sees its prefix and itself; else SDPA."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    packed: PackedBatch | None = options.pop("packed", None)
    if packed is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    fixed = {
        "scale": options.get("scaling"), "dropout_p": options.get("dropout", 0.0),
        "enable_gqa": key.shape[1] != query.shape[1],
    }  # fmt: skip
    # Split, not sliced: the gradient of a slice is as long as the whole row.
    sizes = [segment.end - segment.begin for segment in packed.segments]
    parts = zip(packed.segments, *(states.split(sizes, 2) for states in (query, key, value)), strict=True)
    begun: dict[int, tuple[Tensor, Tensor]] = {}
    answers = []
    for segment, queries, keys, values in parts:
        begun[segment.begin] = keys, values
        if segment.prefix is not None:
            start, end = segment.prefix
            shared = (states[:, :, : end - start] for states in begun[start])
            keys, values = (torch.cat(both, 2) for both in zip(shared, (keys, values), strict=True))
        mask, kind = segment.mask, queries.dtype
        if kind == torch.bfloat16 and queries.device.type == "cpu" and queries.shape[2] <= SMALL:
            # torch 2.13's kernel takes twice as long for short rows in bfloat16, most of it in its backward pass.
            queries, keys, values = queries.float(), keys.float(), values.float()
        found = scaled_dot_product_attention(queries, keys, values, mask, is_causal=mask is None, **fixed)
        answers.append(found.to(kind).transpose(1, 2))
    return torch.cat(answers, 1), None
