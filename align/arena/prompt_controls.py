"""The row a visitor asks with: prompt, buttons, sampling settings and system prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from align.arena.battle_panel import BattlePanel
from align.engine.protocol import Sampling

MAX_PROMPT_CHARACTERS = 20_000
"""also checked by the handlers: what a browser sends may be longer than its fields allow"""


@dataclass
class PromptControls:
    """The components a visitor asks with."""

    prompt: Any
    ask: Any
    stop: Any
    again: Any
    edit: Any
    editing: Any
    """whether the next question replaces the last one"""
    new: Any
    settings: list[Any]
    """temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens, seed"""
    system: Any

    @property
    def outputs(self) -> list[Any]:
        """Everything asking may change beside the panel."""
        return [self.prompt, self.ask, self.stop, self.again, self.edit, self.editing, self.new]


@dataclass(frozen=True)
class SamplingDefaults:
    """Initial values of the settings, and whether seeds are salted."""

    sampling: Sampling
    seed: int | None
    blind: bool


def lay_out_controls(panel: BattlePanel, defaults: SamplingDefaults, words: Any) -> PromptControls:
    """Lay out the row below the panes and the settings."""
    with gr.Row(elem_id="asking", elem_classes="asking"):
        prompt = gr.Textbox(
            label=words("prompt_label"), show_label=False, container=False, placeholder=words("prompt"),
            elem_id="prompt", lines=1, max_lines=6, max_length=MAX_PROMPT_CHARACTERS, scale=8, autofocus=True,
        )  # fmt: skip
        ask = gr.Button(words("ask"), variant="primary", elem_id="ask", scale=1)
        stop = gr.Button(words("stop"), variant="stop", elem_id="stop", scale=1, interactive=False)
        again = gr.Button(words("again"), elem_id="again", scale=1, interactive=False)
        edit = gr.Button(words("edit"), elem_id="edit", scale=1, interactive=False)
        panel.difference_button.render()
        panel.shift_button.render()
        new = gr.Button(words("new"), elem_id="new", elem_classes="next", scale=1)
    with gr.Accordion(words("settings"), open=False, elem_id="sampling", elem_classes="settings"):
        settings = _lay_out_settings(words, defaults)
        system = gr.Textbox(
            "", label=words("system"), info=words("system_info"), lines=1, max_lines=4, elem_id="system"
        )
        follow = gr.Checkbox(True, label=words("follow"), info=words("follow_info"), elem_id="follow")
        follow.change(
            lambda followed: [gr.update(autoscroll=followed)] * len(panel.panes), follow, panel.panes,
            api_visibility="private", show_progress="hidden",
        )  # fmt: skip
    return PromptControls(prompt, ask, stop, again, edit, gr.State(False), new, settings, system)


def _lay_out_settings(words: Any, defaults: SamplingDefaults) -> list[Any]:
    sampling, seed = defaults.sampling, defaults.seed
    scales = {
        "temperature": (0, 2, 0.05),
        "top_p": (0.05, 1, 0.05),
        "top_k": (0, max(200, sampling.top_k), 1),
        "min_p": (0, 1, 0.01),
        "repetition_penalty": (0.5, 2, 0.05),
        "max_new_tokens": (1, max(1024, sampling.max_new_tokens), 1),
    }
    keys = list(scales)
    with gr.Row(elem_classes="row"):
        sliders = [_slider(words, key, scales[key], getattr(sampling, key)) for key in keys[:4]]
    with gr.Row(elem_classes="row"):
        sliders += [_slider(words, key, scales[key], getattr(sampling, key)) for key in keys[4:]]
        seed_box = gr.Textbox(  # a gr.Number without a value shows, and sends, 0
            "" if seed is None else str(seed), label=words("seed"),
            info=words("seed_blind_info" if defaults.blind else "seed_info"), placeholder=words("seed_hint"),
            elem_id="seed", max_length=18,
        )  # fmt: skip
    return [*sliders, seed_box]


def _slider(words: Any, key: str, scale: tuple[float, float, float], value: float) -> Any:
    low, high, step = scale
    return gr.Slider(
        low, high, value, step=step, label=words(key), info=words(f"{key}_info"), elem_id=key, min_width=200
    )
