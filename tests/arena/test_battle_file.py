"""One comparison as a file: the command that writes it, and how it looks and what it does in a browser."""

from __future__ import annotations

import pytest
from browsing import MISFITS

from align.arena.__main__ import main
from align.arena.battles import Battle, Contestant, Pane, Setup, Turn
from align.arena.votes import VoteDetails, VoteStore, build_vote_rows
from align.engine.protocol import RowDone, Sampling
from align.schema import Message, assistant, user

HOSTILE = "</p><script>document.title='taken'</script><img src='http://example.com/x.png'> \u202e\x07 **bold**"
MODELS = ("red@v1", "blue@v2", "green@v3")


def cast(votes: VoteStore, choice: str, answers: list[str], question: str = "How long?") -> str:
    """Vote as the page does; the battle's id."""
    setup = Setup(tuple(Contestant(name, f"sha256:{name}") for name in MODELS), True, {"reference": "base@v1"}, "9.9")
    shared = [Message(role="system", content="Be brief."), user(question)]
    panes = [
        Pane(who, [*shared, assistant(text)]) for who, text in zip(setup.contestants, answers, strict=False)
    ]  # fmt: skip
    done = RowDone(0, "", "stop", 1, 3, 0.1, 0.2)
    turn = Turn(Sampling(max_new_tokens=32), 7, outcomes=[done] * len(panes))
    battle = Battle(panes, phase="answered", turns=[turn])
    votes.append(build_vote_rows(battle, choice, setup, VoteDetails("Two years <b>is</b> right", ("correct",), "ann")))
    return battle.id


@pytest.fixture
def votes(tmp_path) -> VoteStore:
    return VoteStore(tmp_path / "votes")


def export(votes: VoteStore, *words: str) -> int:
    return main(["export", str(votes.path.parent), "--format", "html", *words])


def test_a_comparison_is_written_with_what_was_decided_and_why(tmp_path, votes, capsys):
    cast(votes, "b", ["other", "answers"])
    battle = cast(votes, "a", ["Two years.", HOSTILE])
    out = tmp_path / "one.html"

    assert export(votes, "--battle", battle[:12], "--out", str(out)) == 0

    assert capsys.readouterr().out == f"{out}: 1 comparison\n"
    page = out.read_text()
    for word in (
        "A · red@v1 was preferred", "Be brief.", "How long?", "Two years.", "ann", "Correct", "Temperature 0.7",
        "base@v1", "Two years &lt;b&gt;is&lt;/b&gt; right", "hidden until the vote", battle, "9.9", "<mark ",
    ):  # fmt: skip
        assert word in page
    assert "other" not in page
    assert not any(sign in page for sign in ("<script", "<img", "\u202e", "\x07"))


def test_the_best_of_three_is_one_page_in_either_language(votes, capsys):
    cast(votes, "c", ["one", "two", "three"])

    assert export(votes, "--battle", "last", "--language", "zh-CN") == 0

    page = capsys.readouterr().out
    assert "C · green@v3 更好" in page
    assert page.count("<article") == 3
    assert page.count('class="preferred"') == 1
    assert '<html lang="zh-CN">' in page


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--battle", "zzz"], "no vote has this id"),
        ([], "give --battle ID with it"),
        (["--battle", ""], "give --battle ID with it"),
        (["--format", "csv", "--battle", "last"], "give --battle ID with it, and only with it"),
    ],
)
def test_what_shows_no_comparison_ends_with_2(votes, capsys, words, told):
    cast(votes, "a", ["one", "two"])

    assert export(votes, *words) == 2
    assert told in capsys.readouterr().err


def test_an_id_two_comparisons_share_is_told(votes, capsys):
    begins = {cast(votes, "a", ["one", "two"])[0] for _ in range(17)}  # of 16 digits

    codes = {export(votes, "--battle", begin) for begin in begins}
    assert 2 in codes
    assert "comparisons begin with it; give more of the id" in capsys.readouterr().err


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_file_opens_whole_and_asks_nobody(browser, votes, tmp_path, width, scheme):
    cast(votes, "a", [HOSTILE + " long" * 300, "averylongword" * 60], HOSTILE)
    out = tmp_path / "one.html"
    export(votes, "--battle", "last", "--out", str(out))
    asked, context = [], browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))

    page.goto(out.as_uri())

    assert page.title() == "A · red@v1 was preferred"
    assert asked == [out.as_uri()]
    assert page.evaluate(MISFITS) == []
    assert page.locator("article.preferred").count() == 1
    boxes = [page.locator("article").nth(place).bounding_box() for place in (0, 1)]
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 640)
    context.close()
