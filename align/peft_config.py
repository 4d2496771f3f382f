"""The setting `peft` of the stages that train an adapter of any tuner."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from align.config import AdapterSettings, EvaluatedStageConfig, LoraSettings
from align.errors import UsageError
from align.tuners import Ability, require, tuner_type


class PeftStageConfig(EvaluatedStageConfig):
    """Settings of the stages that train an adapter of any of PEFT's tuners."""

    tuner_abilities: ClassVar[tuple[Ability, ...]] = ()

    peft: dict[str, Any] = Field({})
    """another tuner or start of a new adapter in place of lora: {peft_type: OFT, ...}, as PEFT's own config takes it"""

    @property
    def new_adapter(self) -> AdapterSettings | None:
        """Settings of a new adapter: `peft` where it is given, else `lora`; None where every weight is trained."""
        return self.peft or self.lora

    @model_validator(mode="after")
    def _one_adapter(self) -> Self:
        if not self.peft:
            return self
        if self.lora not in (None, type(self).model_fields["lora"].default, LoraSettings()):
            raise UsageError("peft and lora: both describe the new adapter; write lora's settings under peft")
        if self.lora is None and type(self).model_fields["lora"].default is not None:
            raise UsageError("peft with lora=none: the first trains an adapter, the second every weight; remove one")
        if not isinstance(self.peft.get("peft_type"), str):
            raise UsageError("peft.peft_type: missing; name the tuner, such as peft='{peft_type: OFT}'")
        for ability in ("train", *self.tuner_abilities):
            require(tuner_type(self.peft), ability, "peft")
        if self.quantization != "none":
            require(tuner_type(self.peft), self.quantization, "peft", "use LoRA, or quantization=none")
        return self
