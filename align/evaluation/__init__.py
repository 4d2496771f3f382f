"""How good models are: completions of held-out prompts, judged, with intervals, as a table and as JSON."""

from align.evaluation.metrics import Interval, mean_interval
from align.evaluation.report import render_table, to_json
from align.evaluation.scores import Contender, ModelScore, score_models

__all__ = ["Contender", "Interval", "ModelScore", "mean_interval", "render_table", "score_models", "to_json"]
