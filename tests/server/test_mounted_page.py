"""A page beside the API: mounted at /ui, started with the server, and kept to this machine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fastapi import FastAPI
from serving import poet, running

from align import serve
from align.engine.local import LocalEngine
from align.registry import Registry
from align.server.served_models import describe_models, find_models


def test_a_page_is_mounted_started_and_guarded_like_the_rest():
    heard = []

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        heard.append("started")
        yield
        heard.append("ended")

    page = FastAPI(lifespan=lifespan)
    page.get("/")(lambda: "a page")
    with running(poet(), page=page) as server:
        assert server.get("/ui/").json() == "a page"
        assert server.get("/ui/", host="evil.example").status_code == 421
        assert server.get("/v1/models").status_code == 200
        assert heard == ["started"]

    assert heard == ["started", "ended"]


@pytest.mark.slow
def test_the_comparison_page_is_shown_over_the_engine_of_the_api(models: Registry, engine: LocalEngine):
    checkpoints = find_models(models, ["warm-sft", "cool-dpo@prod"])

    # Where no event loop runs, gradio 6.31 makes one for each handler it is given and closes none of them.
    async def build() -> FastAPI:
        return serve._page(engine, models, checkpoints)

    page = asyncio.run(build())
    with running(engine, describe_models(models, checkpoints), page=page) as server:
        shown = server.get("/ui/")
        config = server.get("/ui/config")

    assert shown.status_code == config.status_code == 200
    assert "frame-ancestors 'none'" in shown.headers["content-security-policy"]
    assert config.json()["components"]
