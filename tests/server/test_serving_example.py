"""The example of several replicas keeps to what the server does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import yaml

from align import serve
from align.command_line import parse_options
from align.server.limits import ServerLimits

SERVING = Path(__file__).parents[2] / "examples" / "serving"
COMPOSE = yaml.safe_load((SERVING / "compose.yaml").read_text())
NGINX = (SERVING / "nginx.conf").read_text()


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, pattern
    return int(found[1])


def test_the_replicas_are_started_with_options_that_there_are():
    shell = shlex.split(COMPOSE["services"]["align"]["command"])[-1]
    words = shlex.split(shell.replace("$$ALIGN_MODELS", "one two"))

    options = parse_options(serve.build_parser(), words[words.index("align.serve") + 1 :])

    assert words[:3] == ["exec", "python", "-m"]
    assert (options.models, options.host, options.port) == (["one", "two"], "0.0.0.0", 8000)
    assert Path(options.token_file).name in COMPOSE["secrets"]


def test_the_proxy_waits_longer_and_takes_no_more_than_a_replica():
    limits = ServerLimits()

    assert number(r"proxy_read_timeout (\d+)s", NGINX) > limits.max_seconds
    assert number(r"client_max_body_size (\d+)m", NGINX) << 20 == limits.max_body_bytes
    assert number(r"(\d+)s", COMPOSE["services"]["align"]["stop_grace_period"]) > limits.drain_seconds
    assert "proxy_buffering off" in NGINX
