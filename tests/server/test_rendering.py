"""The real command while a prompt is rendered that never ends: streams go on, and SIGTERM ends it in order."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import httpx
import pytest
from serving import PATIENCE, until
from test_serve_door import start, status

LOOPS = (
    "{% if messages[0].content == 'loop' %}" + "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3 + "{% endif %}"
)
CHAT = "/v1/chat/completions"


def ask(url: str, content: str, **more) -> httpx.Response:
    body = {"model": "looping", "messages": [{"role": "user", "content": content}], "max_tokens": 4, **more}
    return httpx.post(url + CHAT, json=body, timeout=PATIENCE, verify=False)


@pytest.fixture
def looping(tiny_base: Path, tmp_path: Path) -> Path:
    """A model whose template never ends for one question."""
    folder = tmp_path / "looping"
    shutil.copytree(tiny_base, folder)
    template = folder / "chat_template.jinja"
    template.write_text(LOOPS + template.read_text())
    return folder


@pytest.mark.slow
def test_sigterm_ends_the_server_while_a_prompt_whose_client_left_is_rendered(looping, tmp_path):
    process = start("-m", "align.serve", str(looping), "--port", "0", "--registry", str(tmp_path / "registry"))
    assert process.stdout is not None
    url = re.search(r"http://\S+:\d+", process.stdout.readline())[0]
    until(lambda: status(url) == 200)
    assert ask(url, "hello").status_code == 200

    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            url + CHAT, json={"model": "looping", "messages": [{"role": "user", "content": "loop"}]}, timeout=0.5,
            verify=False,
        )  # fmt: skip
    again = ask(url, "hello")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE)

    assert again.status_code == 200
    assert (process.returncode, out.splitlines()[-1]) == (0, "ended in order")
    assert "Traceback" not in err
