"""What libraries print of their own accord stays out of a run's output; what they report as errors does not."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from align.models.quiet_libraries import quiet_libraries


@pytest.mark.parametrize(
    "name",
    ["bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions", "matplotlib.font_manager"],
)
def test_advice_is_hidden_and_errors_are_not(name):
    quiet_libraries()

    logger = logging.getLogger(name)
    assert not logger.isEnabledFor(logging.WARNING)
    assert logger.isEnabledFor(logging.ERROR)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_run_writes_nothing_to_stderr(tmp_path, tiny_base, demonstrations, quantization):
    if quantization != "none":
        pytest.importorskip("bitsandbytes", reason="quantization needs align[qlora]")
    settings = [f"model={tiny_base}", f"data={demonstrations}", "name=quiet", "max_steps=2", "bf16=false"]

    done = subprocess.run(
        [sys.executable, "-m", "align.sft", "--registry", str(tmp_path), f"quantization={quantization}", *settings],
        capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip

    assert (done.returncode, done.stderr) == (0, "")


_PLAIN_RUN = """
import sys
from align import sft
from align.training.command import main
assert main(sft.STAGE, sys.argv[1:]) == 0
loaded = list(sys.modules)
from peft.import_utils import is_bnb_available
print(is_bnb_available(), *loaded, file=sys.stderr)
"""
UNUSED = {
    "bitsandbytes", "torch._inductor.compile_fx", "wandb", "trackio", "mlflow", "comet_ml", "scipy", "sklearn",
    "gradio", "fastapi", "lm_eval", "tensorboard", "vllm",
}  # fmt: skip


def test_a_plain_run_imports_no_package_that_it_does_not_use(tmp_path, tiny_base, demonstrations):
    pytest.importorskip("bitsandbytes", reason="what is not installed is not imported either")
    words = ["--registry", str(tmp_path), f"model={tiny_base}", f"data={demonstrations}", "name=plain", "max_steps=2"]

    done = subprocess.run(
        [sys.executable, "-c", _PLAIN_RUN, *words, "per_device_train_batch_size=2"],
        capture_output=True, text=True, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip

    available, *loaded = done.stderr.splitlines()[-1].split()
    assert "trl.trainer.sft_trainer" in loaded
    assert not UNUSED & set(loaded)
    assert available == "True"  # for a later run in nf4


_PRODUCTS_OF_MANY_SIZES = """
import re
from pathlib import Path
from align.models.quiet_libraries import quiet_libraries
quiet_libraries()
import torch
torch.set_num_threads(1)
weights = torch.randn(512, 512).bfloat16()
def mebibytes():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
torch.randn(100, 512).bfloat16() @ weights
before = mebibytes()
for rows in range(100, 900):
    torch.randn(rows, 512).bfloat16() @ weights
print(mebibytes() - before)
"""


@pytest.mark.slow
def test_products_in_bfloat16_of_ever_new_sizes_do_not_fill_the_memory():
    def growth(**settings: str) -> int:
        command = [sys.executable, "-c", _PRODUCTS_OF_MANY_SIZES]
        return int(subprocess.run(command, capture_output=True, check=True, env=os.environ | settings).stdout)

    kept_by_default = growth(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024", LRU_CACHE_CAPACITY="1024")

    assert growth() < max(kept_by_default / 2, 48)  # where bfloat16 is not compiled, neither grows
