"""The leaderboard as HTML: strengths with intervals, pair records, warnings and agreement."""

from __future__ import annotations

from html import escape

from align.arena.page_text import PAGE_TEXTS
from align.arena.ranking import Agreement, Leaderboard, Rating

Words = dict[str, str]


def leaderboard_html(board: Leaderboard, language: str) -> str:
    """Return the leaderboard, best model first."""
    words = PAGE_TEXTS[language]
    if not board.standings:
        return placeholder(words["no_votes"])
    return "".join(
        (
            _warnings(board, words),
            f"<h3>{escape(words['votes_counted'].format(votes=board.votes, prompts=board.prompts))}</h3>",
            _standings(board.standings, words),
            f"<h3>{escape(words['matrix'])}</h3>",
            _matrix(board, words),
            f'<div class="two">{_position(board, words)}',
            _agreement(board.agreement, words["agreement"], words["agreement_text"], words),
            _agreement(board.self_agreement, words["self_agreement"], words["self_agreement_text"], words),
            "</div>",
        )
    )


def placeholder(text: str) -> str:
    """Return a tab's content when there is nothing to show but the reason."""
    return f'<div class="empty">{escape(text)}</div>'


def _warnings(board: Leaderboard, words: Words) -> str:
    return "".join(
        f'<p class="warning">{escape(words[f"warning_{warning.key}"].format(**warning.values))}</p>'
        for warning in board.warnings
    )


def _standings(standings: list[Rating], words: Words) -> str:
    ends = [end for rating in standings for end in (rating.low, rating.high) if end is not None]
    reach = max([1.0, *map(abs, ends)]) * 1.05
    heads = ("", "standing_model", "standing_strength", "standing_votes", "standing_record")
    head = "".join(f'<th scope="col">{escape(words[key]) if key else ""}</th>' for key in heads)
    rows = "".join(_rating_row(number, rating, reach, words) for number, rating in enumerate(standings, start=1))
    return _table(head, rows)


def _rating_row(number: int, rating: Rating, reach: float, words: Words) -> str:
    if rating.strength is None or rating.low is None or rating.high is None:
        rank, strength = "–", f'<span class="calm">{escape(words["unranked"])}</span>'
    else:
        rank = str(number)
        label = f"{rating.strength:+.2f} ({rating.low:+.2f} … {rating.high:+.2f})"
        strength = f"{label}{_bar((rating.low, rating.strength, rating.high), reach)}"
    return (
        f'<tr><td>{rank}</td><th scope="row">{escape(rating.reference)}</th><td class="strength">{strength}</td>'
        f"<td>{rating.votes}</td><td>{rating.wins} · {rating.ties} · {rating.losses}</td></tr>"
    )


def _bar(interval: tuple[float, float, float], reach: float) -> str:
    """Return an interval with its estimate on a scale from -reach to reach, the average marked."""
    low, middle, high = (f"{50 + 50 * max(-1.0, min(1.0, value / reach)):.2f}%" for value in interval)
    return (
        '<svg class="bar" aria-hidden="true"><line class="axis" x1="0" x2="100%" y1="13" y2="13"/>'
        '<line class="axis" x1="50%" x2="50%" y1="3" y2="23"/>'
        f'<line class="span" x1="{low}" x2="{high}" y1="13" y2="13"/><circle cx="{middle}" cy="13" r="5"/></svg>'
    )


def _matrix(board: Leaderboard, words: Words) -> str:
    names = [rating.reference for rating in board.standings]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = []
    for name in names:
        cells = (board.matrix.get(name, {}).get(other) for other in names)
        label = "".join(f"<td>{f'{cell[0]} · {cell[1]} · {cell[2]}' if cell else '–'}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{label}</tr>')
    caption = f'<th scope="col">{escape(words["standing_model"])}</th>'
    return _table(caption + head, "".join(rows))


def _table(head: str, rows: str) -> str:
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _position(board: Leaderboard, words: Words) -> str:
    bias = board.position_bias
    if bias is None:
        return _fact(words["position"], words["unknown_yet"])
    share, low, high = bias.chance
    return _fact(words["position"], words["position_text"].format(share=share, low=low, high=high), share)


def _agreement(agreed: Agreement | None, title: str, text: str, words: Words) -> str:
    if agreed is None:
        return _fact(title, words["unknown_yet"])
    label = text.format(share=agreed.share, votes=agreed.votes, kappa=agreed.kappa)
    return _fact(title, label, agreed.share)


def _fact(title: str, label: str, share: float | None = None) -> str:
    meter = "" if share is None else _meter(share)
    return f'<div><h3>{escape(title)}</h3>{meter}<p class="calm">{escape(label)}</p></div>'


def _meter(share: float) -> str:
    return (
        '<svg class="meter" aria-hidden="true"><rect class="track" width="100%" height="8" rx="4"/>'
        f'<rect class="filled" width="{100 * share:.1f}%" height="8" rx="4"/></svg>'
    )
