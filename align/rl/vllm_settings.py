"""Generation through vLLM, as TRL 1.16 offers it: settings, checks, and the arguments for TRL.

vLLM runs in this process beside the model that trains (`colocate`), or as a server on GPUs of its own. TRL hands it the
merged weights before every rollout.
"""

from __future__ import annotations

import importlib.util
import urllib.request
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from align.config import Settings, TrainerStageConfig
from align.errors import MachineError, UsageError

_SERVER_TIMEOUT_S = 10.0


class VllmSettings(Settings):
    """The vLLM engine that generates."""

    mode: Literal["colocate", "server"] = "colocate"
    """vLLM in this process on the same GPU, or a server on other GPUs"""
    server_base_url: str | None = None
    """address of the server: http://HOST:PORT"""
    gpu_memory_utilization: float = Field(0.3, gt=0, lt=1)
    """share of the GPU memory for vLLM with mode=colocate"""

    @model_validator(mode="after")
    def _check_address(self) -> Self:
        url = self.server_base_url
        if self.mode == "server" and url is None:
            raise UsageError("vllm.mode=server: give vllm.server_base_url=http://HOST:PORT, where vllm serve listens")
        if self.mode == "colocate" and url is not None:
            raise UsageError(f"vllm.server_base_url={url}: found vllm.mode=colocate; set vllm.mode=server")
        if url is not None and not url.startswith(("http://", "https://")):
            raise UsageError(f"vllm.server_base_url={url}: expected http://HOST:PORT")
        return self


class VllmStageConfig(TrainerStageConfig):
    """Settings of a stage that can generate with vLLM."""

    vllm: VllmSettings | None = None
    """generate with vLLM; a resumed run then samples anew from its last checkpoint on"""

    @model_validator(mode="after")
    def _check_vllm(self) -> Self:
        if self.vllm is not None and "generation_kwargs" in self.trainer:
            raise UsageError("trainer.generation_kwargs: with vllm it holds the stop tokens; remove it")
        if self.vllm is not None and self.quantization == "int8":
            raise UsageError("vllm with quantization=int8: vLLM loads no int8 base; give nf4 or none")
        return self


def check_vllm(config: VllmStageConfig, base: str) -> None:
    """Raise UsageError where vLLM cannot be used on this machine, MachineError when its server does not answer.

    `base` is the model that the server should serve.
    """
    if config.vllm is None:
        return
    import torch

    without = "or generate without it: vllm=none"
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(f"vllm: vllm is not installed; pip install 'trl[vllm]', {without}")
    if not torch.cuda.is_available():
        raise UsageError(f"vllm: found no GPU, which both modes of vLLM need here; take a machine with one, {without}")
    if config.vllm.server_base_url is None:
        return
    url = config.vllm.server_base_url.rstrip("/")
    try:
        urllib.request.urlopen(f"{url}/health", timeout=_SERVER_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise MachineError(
            f"vllm.server_base_url={url}: no server answers there ({error}); start one: VLLM_SERVER_DEV_MODE=1 vllm "
            f'serve {base} --weight-transfer-config \'{{"backend": "nccl"}}\' --logprobs-mode processed_logprobs'
        ) from None


def vllm_arguments(config: VllmStageConfig, stops: Sequence[int]) -> dict[str, Any]:
    """Return the vLLM arguments of TRL's config: mode, server, memory, row length and stop tokens; {} without vLLM."""
    if config.vllm is None:
        return {}
    return {
        "use_vllm": True,
        "vllm_mode": config.vllm.mode,
        "vllm_server_base_url": config.vllm.server_base_url,
        "vllm_gpu_memory_utilization": config.vllm.gpu_memory_utilization,
        "vllm_max_model_length": config.max_length,
        # vLLM's own defaults come from the base's files, not from our chat template.
        "generation_kwargs": {"stop_token_ids": list(stops)},
    }
