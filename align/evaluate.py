"""`align evaluate MODEL [MODEL ...] --data NAME`: how good models are, each against the first."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from align.command_line import parse_options
from align.config import build, write
from align.engine.options import add_model_options, precision_from
from align.errors import MachineError, UsageError, guard
from align.strict_yaml import load_yaml

if TYPE_CHECKING:
    from align.evaluation.jsonl_store import JsonlStore
    from align.evaluation.judging import Judge
    from align.evaluation.request import EvaluationRequest
    from align.evaluation.session import Outputs
    from align.registry import Registry


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    options = parse_options(build_parser(), argv)
    return guard(lambda: _run(options), debug=options.debug)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        "align evaluate",
        description="Let models answer the same prompts and say how good each is, with 95% intervals; every other "
        "model is compared with the first. The numbers are kept in the registry beside each version.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="registry references, folders or hub ids")
    parser.add_argument("--data", metavar="NAME", help="held-out data: a name of the catalogue, a file or a folder")
    parser.add_argument("--limit", type=int, metavar="N", help="only so many records, spread over the data")
    parser.add_argument("--on_bad_row", choices=("error", "skip"), default="error", help="refuse, or count (error)")
    _measures(parser)
    _judges(parser)
    _benchmarks(parser)
    _outputs(parser)
    sampling = parser.add_argument_group("how answers are written")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default 0, greedy")
    sampling.add_argument("--top_p", type=float, default=1.0, metavar="P", help="nucleus; 1 is all")
    sampling.add_argument("--max_new_tokens", type=int, default=256, metavar="N", help="longest answer (256)")
    sampling.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same numbers (0)")
    add_model_options(parser)
    return parser


def _measures(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is measured")
    group.add_argument(
        "--scorer", action="append", default=[], metavar="NAME[,NAME]",
        help="scorers, bleu, chrf or rouge; by default the data's own, or what its answers allow",
    )  # fmt: skip
    group.add_argument(
        "--rewards", metavar="YAML", help="reward functions: '[{name: keyword, args: {words: [thanks]}}]'"
    )
    group.add_argument("--reward_model", metavar="REF", help="score answers by a reward model, too")
    group.add_argument("--classify", action="store_true", help="choose among the answers that occur by likelihood")
    group.add_argument("--labels", metavar="A,B,...", help="choose among these by likelihood")
    group.add_argument("--by", action="append", default=[], metavar="KEY", help="slices: language or a key of meta")
    group.add_argument("--no_kl", action="store_true", help="leave out the KL to parent and base")
    group.add_argument(
        "--allow-code-execution", action="store_true", help="let scorers run what models wrote, in a sandboxed process"
    )


def _judges(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who judges pairs against the first model")
    group.add_argument(
        "--judge", action="append", default=[], metavar="WHO",
        help="reward_model, rewards, or the URL of an OpenAI-compatible server such as http://localhost:8000/v1",
    )  # fmt: skip
    group.add_argument("--judge_model", metavar="NAME", help="the model to ask there")
    group.add_argument("--judge_timeout", type=float, default=60.0, metavar="S", help="seconds for a verdict (60)")


def _benchmarks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("public benchmarks, in place of --data")
    group.add_argument("--harness", metavar="TASK[,TASK]", help="tasks of lm-evaluation-harness, such as arc_easy,mmlu")
    group.add_argument("--include_path", metavar="DIR", help="a folder with task files of your own")
    group.add_argument("--num_fewshot", type=int, metavar="N", help="examples in the prompt")
    group.add_argument("--chat_template", action="store_true", help="ask in the model's chat template")
    group.add_argument("--batch_size", default="1", metavar="N", help="of the harness; N or auto (1)")


def _outputs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where it goes")
    group.add_argument("--json", metavar="FILE", help="all numbers")
    group.add_argument("--samples", metavar="FILE.jsonl", help="every completion with its numbers")
    group.add_argument("--report", metavar="FILE.html", help="one page with plots and the worst examples")
    group.add_argument("--no_record", action="store_true", help="keep no numbers beside the versions")


def _run(options: argparse.Namespace) -> int:
    from align.evaluation.session import Outputs
    from align.registry import open_registry

    if bool(options.data) == bool(options.harness):
        evaluation = "both given" if options.data else "missing"
        raise UsageError(
            f"--data: {evaluation}; give --data NAME (align data list shows some) or --harness TASK, one of them"
        )
    outputs = Outputs(options.json, options.samples, options.report, record=not options.no_record)
    outputs.check()
    registry = open_registry(options.registry, base=options.base)
    if outputs.record and registry.root.is_dir():
        _refuse_unwritable(registry)
    return benchmark(registry, options) if options.harness else evaluate(registry, options, outputs)


def _refuse_unwritable(registry: Registry) -> None:
    """Raise before the work what would end it after hours, with the switch that does without."""
    try:
        registry.check_writable()
    except MachineError as error:
        raise MachineError(f"{error}; --no_record measures without keeping the numbers there") from None


def benchmark(registry: Registry, options: argparse.Namespace) -> int:
    """Run public benchmarks by lm-evaluation-harness, tell and keep their numbers."""
    from align.evaluation.harness import Benchmarks, draw_scores, harness_record, record_harness_scores, run_harness
    from align.evaluation.session import write_json

    for switch in ("samples", "report", "judge", "scorer", "rewards", "reward_model"):
        if getattr(options, switch):
            raise UsageError(f"--{switch}: not with --harness, which has tasks and metrics of its own; leave one out")
    benchmarks = Benchmarks(
        tasks=tuple(_split_words([options.harness])),
        include_path=options.include_path,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        chat_template=options.chat_template,
        batch_size=options.batch_size,
    )
    scores = run_harness(registry, options.models, benchmarks, precision_from(options))
    write(draw_scores(scores))
    if options.json:
        models = [{"reference": each.checkpoint.reference, **harness_record(each)} for each in scores]
        write_json(options.json, {"models": models})
    if not options.no_record:
        tell_kept(record_harness_scores(registry, scores))
    return 0


def read_options(options: argparse.Namespace) -> EvaluationRequest:
    """What the command line asked for; UsageError for what does not go together."""
    from align.engine.protocol import Sampling
    from align.evaluation.request import EvaluationRequest
    from align.rewards.weighted_rewards import RewardSettings

    if options.limit is not None and options.limit < 2:
        raise UsageError(f"--limit {options.limit}: an interval takes two records or more")
    listed = load_yaml(options.rewards, "--rewards") if options.rewards else []
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise UsageError("--rewards: not a list; write '[{name: length, args: {target: 20}}]'")
    return EvaluationRequest(
        data=options.data,
        sampling=Sampling(options.temperature, options.top_p, options.max_new_tokens),
        seed=options.seed,
        limit=options.limit,
        on_bad_row=options.on_bad_row,
        scorers=tuple(_split_words(options.scorer)),
        rewards=tuple(build(RewardSettings, each) for each in listed),
        reward_model=options.reward_model,
        labels=tuple(_split_words([options.labels] if options.labels else [])),
        classify=options.classify,
        kl=not options.no_kl,
        by=tuple(_split_words(options.by)),
        allow_code=options.allow_code_execution,
        precision=precision_from(options),
    )


def _split_words(given: list[str]) -> list[str]:
    return list(dict.fromkeys(word.strip() for text in given for word in text.split(",") if word.strip()))


def evaluate(registry: Registry, options: argparse.Namespace, outputs: Outputs) -> int:
    """Measure, tell, and keep."""
    from align.evaluation import session
    from align.evaluation.jsonl_store import JsonlStore
    from align.evaluation.terminal_tables import draw_result

    verdicts = JsonlStore(registry.cache_dir / "verdicts.jsonl")
    request, judges = read_options(options), read_judges(options, verdicts)
    evaluation = session.evaluate(registry, options.models, request, judges)
    write(draw_result(evaluation.result))
    for note in [*evaluation.result.notes, *(note for model in evaluation.result.models for note in model.notes)]:
        write(f"note: {note}")
    recorded = session.save_evaluation(registry, evaluation, outputs)
    if outputs.report:
        write(f"report: {outputs.report}")
    tell_kept(recorded)
    session.require_verdicts(evaluation.result)
    if judges and not any(each.has_failures for model in evaluation.result.models for each in model.judged):
        verdicts.forget()
    return 0


def read_judges(options: argparse.Namespace, recorded: JsonlStore | None = None) -> dict[str, Judge | str]:
    """The judges by name: measures whose rows decide, or servers to ask; UsageError for one that cannot be."""
    from align.evaluation.remote_judge import judge_at

    if options.judge and len(options.models) < 2:
        raise UsageError("--judge: a judge compares models with the first one; give two models or more")
    if not options.judge_timeout > 0:
        raise UsageError(f"--judge_timeout {options.judge_timeout:g}: give seconds, more than 0")
    evaluation: dict[str, Judge | str] = {}
    for who in options.judge:
        if who == "reward_model":
            if not options.reward_model:
                raise UsageError("--judge reward_model: which one; give --reward_model REF")
        elif who == "rewards":
            if not options.rewards:
                raise UsageError("--judge rewards: which ones; give --rewards '[{name: ...}]'")
            evaluation["rewards"] = "reward"
        else:
            judge = judge_at(who, options.judge_model, options.judge_timeout, recorded)
            twin = judge.model in (options.reward_model, *evaluation)
            evaluation[f"{judge.model} at {who}" if twin else judge.model] = judge
    return evaluation


def tell_kept(recorded: list[str]) -> None:
    """Say beside which versions numbers are now."""
    if recorded:
        write(f"kept beside {', '.join(recorded)}; align registry show {recorded[0]}")


if __name__ == "__main__":
    sys.exit(main())
