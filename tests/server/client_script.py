"""Ask a server through one of the clients people use; started by a test in a process of its own.

Arguments: a client, the address of the API, and a JSON list of requests: each with `messages`, and options by OpenAI's
names. Prints a JSON list of [text, the same streamed] for each request.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

Ask = Callable[[dict[str, Any], bool], str]


def with_openai(url: str) -> Ask:
    import openai

    client = openai.OpenAI(base_url=url, api_key="x", max_retries=0)

    def ask(request: dict[str, Any], stream: bool) -> str:
        reply = client.chat.completions.create(**request, stream=stream)
        if not stream:
            return reply.choices[0].message.content or ""
        return "".join(chunk.choices[0].delta.content or "" for chunk in reply if chunk.choices)

    return ask


def with_litellm(provider: str) -> Callable[[str], Ask]:
    def build(url: str) -> Ask:
        import litellm

        litellm.suppress_debug_info = True

        def ask(request: dict[str, Any], stream: bool) -> str:
            model = f"{provider}/{request['model']}"
            asked = request | {"model": model, "api_base": url, "api_key": "x", "stream": stream, "num_retries": 0}
            reply = litellm.completion(**asked)
            if not stream:
                return reply.choices[0].message.content or ""
            return "".join(chunk.choices[0].delta.content or "" for chunk in reply)

        return ask

    return build


def with_langchain(url: str) -> Ask:
    from langchain_openai import ChatOpenAI

    def ask(request: dict[str, Any], stream: bool) -> str:
        options = {name: value for name, value in request.items() if name != "messages"}
        chat = ChatOpenAI(base_url=url, api_key="x", max_retries=0, **options)
        if not stream:
            return chat.invoke(request["messages"]).content
        return "".join(chunk.content for chunk in chat.stream(request["messages"]))

    return ask


def with_llm(url: str) -> Ask:
    """simonw's `llm`, on the command line; it takes a system text and one question."""
    folder = os.environ["LLM_USER_PATH"]

    def ask(request: dict[str, Any], stream: bool) -> str:
        with open(f"{folder}/extra-openai-models.yaml", "w") as file:
            file.write(f"- model_id: here\n  model_name: {request['model']}\n  api_base: {url}\n")
        *system, question = request["messages"]
        options = [[f"{name}", f"{value}"] for name, value in request.items() if name not in ("messages", "model")]
        words = [word for pair in options for word in ("-o", *pair)]
        words += ["-s", system[0]["content"]] if system else []
        words += [] if stream else ["--no-stream"]
        command = [sys.executable, "-m", "llm", "prompt", "-m", "here", "--key", "x", *words, question["content"]]
        done = subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise SystemExit(done.stderr.decode())
        return done.stdout.decode().removesuffix("\n")

    return ask


CLIENTS = {
    "openai": with_openai,
    "litellm": with_litellm("openai"),
    "litellm for vLLM": with_litellm("hosted_vllm"),
    "langchain-openai": with_langchain,
    "llm": with_llm,
}

if __name__ == "__main__":
    ask = CLIENTS[sys.argv[1]](sys.argv[2])
    answers = [[ask(request, stream) for stream in (False, True)] for request in json.loads(sys.argv[3])]
    sys.stdout.write("\n" + json.dumps(answers) + "\n")
