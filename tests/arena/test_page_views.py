"""What the page shows, as text: no browser, no gradio."""

from __future__ import annotations

import asyncio
import json
import re
from html import unescape

import pytest
from fake_engine import FakeEngine

from align.arena import battle_view, result_views
from align.arena.battles import Arena, Battle, Contestant, Pane, Setup, Turn
from align.arena.page_text import PAGE_TEXTS, read_settings, visitor_of
from align.arena.ranking import leaderboard
from align.arena.votes import VoteStore
from align.engine.protocol import RowDone, Sampling, ShiftedToken
from align.errors import UsageError
from align.registry import Registry
from align.schema import assistant, user

EN, ZH = PAGE_TEXTS["en"], PAGE_TEXTS["zh-CN"]
SETUP = Setup((Contestant("red@v1", "sha256:" + "ab" * 32), Contestant("blue@v1", "sha256:" + "cd" * 32)), blind=True)


def battle(phase: str, **turn) -> Battle:
    panes = [Pane(contestant, [user("hi"), assistant("hello")]) for contestant in SETUP.contestants]
    done = RowDone(0, "hello", "stop", 3, 10, 0.05, 0.5)
    return Battle(panes, phase=phase, turns=[Turn(Sampling(), 7, outcomes=[done, done], **turn)], choice="a")


@pytest.mark.parametrize("phase", ["open", "streaming", "answered", "failed"])
def test_a_blind_battle_tells_neither_names_nor_speed_before_the_vote(phase):
    told = battle_view.status(battle(phase, scores=[1.0, 2.0]), SETUP, "en") + battle_view.pane_label(
        battle(phase), 0, SETUP
    )

    assert not any(word in told for word in ("red@", "blue@", "abab", " ms", "reward"))


def test_after_the_vote_names_digests_speed_and_scores_are_told():
    told = battle_view.status(battle("voted", scores=[1.0, -2.0], truncated=True), SETUP, "en")

    for word in ("red@v1", "blue@v1", "abababababab", "20 tokens/s", "50 ms", "reward 1.00", "reward -2.00", "seed 7"):
        assert word in told
    assert EN["saved_early"] in told


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("a <b>word</b> and a < b", "a <·b>word<·/b> and a < b"),
        ("`<b>` <!-- x --> <?php", "`<·b>` <·!-- x --> <·?php"),
        ("![x](u) a != b[0] `![0]`", "!·[x](u) a != b[0] `!·[0]`"),
        ("```mermaid\n~~~ __proto__\n```python", "```·mermaid\n~~~ ·__proto__\n```python"),
        ("$$a<b$$ <i> $$c\n<d$$ $$<e>", "$$a<b$$ <·i> $$c\n<d$$ $$<·e>"),
    ],
)
def test_what_would_open_a_tag_an_image_or_a_diagram_carries_a_mark(written, shown):
    assert battle_view.disarm_markdown(written) == shown.replace("·", battle_view.MARK)


def test_tokens_are_escaped_and_carry_their_alternatives_as_data():
    token = ShiftedToken("<b>", -0.1, -3.1, (("<b>", -0.1),), (("'\"><script>", -0.2),))

    box = battle_view.render_token_shift([[token]], 0, EN)

    assert "<b>&lt;" not in box
    assert "<script" not in box
    assert 'class="tok m3"' in box
    assert json.loads(unescape(re.search(r'data-logprobs="([^"]*)"', box)[1])) == {
        "p": -0.1,
        "b": -3.1,
        "top": [["<b>", -0.1]],
        "base": [["'\"><script>", -0.2]],
    }
    assert "+3.00 nats per token over 1 tokens" in box


@pytest.mark.parametrize(
    ("shift", "shade"), [(0.0, ""), (0.2, ""), (0.3, "m1"), (-1.5, "l2"), (3.0, "m3"), (9.0, "m4"), (-9.0, "l4")]
)
def test_a_shift_has_one_of_four_shades_each_way(shift, shade):
    assert battle_view.shade(shift) == shade


def test_only_the_last_answer_of_a_conversation_is_open():
    token = ShiftedToken("", -1.0, -1.0, (), ())

    box = battle_view.render_token_shift([[token], [token]], 1, ZH)

    assert [found == " open" for found in re.findall(r'<details class="shift-box"( open)?>', box)] == [False, True]
    assert "◌" in box


def votes(count: int, choice: str = "a") -> list[dict]:
    models = ({"a": "red@v1", "b": "blue@v1"}, {"a": "blue@v1", "b": "red@v1"})
    return [{"models": models[turn % 2], "choice": choice, "prompt": [user(f"q{turn}")]} for turn in range(count)]


def test_few_votes_are_not_ranked_and_the_page_says_so():
    told = result_views.leaderboard_html(leaderboard(votes(3)), "en")

    assert told.count(f">{EN['unranked']}<") == 2
    assert "Not enough votes to place" in told
    assert EN["unknown_yet"] in told


def test_standings_have_intervals_records_and_warnings_in_both_languages():
    rows = votes(30) + votes(10, "tie")
    for row in rows:
        row["scores"] = {"a": 1.0, "b": 0.0}
    for language in ("en", "zh-CN"):
        told = result_views.leaderboard_html(leaderboard(rows), language)

        assert told.count('class="span"') == 2
        assert "15 · 10 · 15" in told
        assert "100%" in told
    assert result_views.leaderboard_html(leaderboard([]), "en") == result_views.placeholder(EN["no_votes"])


def test_a_model_tells_its_lineage_results_and_curves(registry: Registry, tmp_path):
    with registry.stage("root") as staging:
        (staging.path / "config.json").write_text("{}")
        staging.commit({"stage": "pretrain", "kind": "base"})
    root = registry.resolve("root")
    log = [
        {"step": step, "loss": 1 / step, "odd<b>": step, "eval_loss": 2 / step, "grad_norm": float("nan")}
        for step in (1, 2, 3)
    ]
    with registry.stage("child") as staging:
        (staging.path / "config.json").write_text("{}")
        (staging.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
        parent = {"reference": root.reference, "digest": root.digest}
        staging.commit({"stage": "sft", "kind": "policy", "parents": [parent], "metrics": {"loss": 0.3333}})

    told = result_views.model_html(registry, "child", "en")

    assert told.index("child@v1") < told.index("root@v1")
    assert root.digest.removeprefix("sha256:")[:12] in told
    assert told.count("<polyline") == 3  # loss, its held-out twin and the odd one; NaN alone has no line
    assert "odd&lt;b&gt;" in told
    assert "0.3333" in told
    assert EN["no_curves"] in result_views.model_html(registry, "root", "en")


def test_a_browser_says_its_language_and_a_pseudonym_and_nothing_else():
    assert (visitor_of("zh-CN|v12").language, visitor_of("zh-CN|v12").voter) == ("zh-CN", "v12")
    assert visitor_of("en|<b>Ann</b>").voter == ""
    assert visitor_of(None).language == "en"


def test_a_slow_page_draws_fewer_frames_instead_of_falling_behind(tmp_path):
    engine = FakeEngine([one.reference for one in SETUP.contestants], lambda row: "word " * 300)
    arena = Arena(engine, SETUP, VoteStore(tmp_path))
    fought = arena.new_battle()
    arena.ask(fought, "hi", arena.new_turn(Sampling(max_new_tokens=400), 0))

    async def draw() -> int:
        frames = 0
        async for _ in arena.frames(fought):
            frames += 1
            await asyncio.sleep(0.1)
        return frames

    assert asyncio.run(draw()) < 30
    assert fought.phase == "answered"


def test_settings_keep_what_the_page_has_no_field_for():
    usual = Sampling(stop=("END",), frequency_penalty=0.5)

    sampling, seed = read_settings([0.5, 0.9, 40, 0.1, 1.1, 64, " 12 "], usual)

    assert (sampling.stop, sampling.frequency_penalty, sampling.top_k, sampling.min_p) == (("END",), 0.5, 40, 0.1)
    assert (sampling.temperature, sampling.max_new_tokens, seed) == (0.5, 64, 12)
    for bad in ([None, 1, 0, 0, 1, 8, ""], [1, 1, 0, 0, 1, 8, "-1"], [1, 7, 0, 0, 1, 8, ""]):
        with pytest.raises(UsageError):
            read_settings(bad, usual)
