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
from align.waiting import announce

if TYPE_CHECKING:
    from align.evaluation.jsonl_store import JsonlStore
    from align.evaluation.metric import Judge
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
    _add_metric_options(parser)

    benchmarks = parser.add_argument_group("public benchmarks, in place of --data").add_argument
    benchmarks("--harness", metavar="TASK[,TASK]", help="tasks of lm-evaluation-harness, such as arc_easy,mmlu")
    benchmarks("--include_path", metavar="DIR", help="a folder with task files of your own")
    benchmarks("--num_fewshot", type=int, metavar="N", help="examples in the prompt")
    benchmarks("--chat_template", action="store_true", help="ask in the model's chat template")
    benchmarks("--batch_size", default="1", metavar="N", help="of the harness; N or auto (1)")

    outputs = parser.add_argument_group("outputs").add_argument
    outputs("--json", metavar="FILE", help="all numbers")
    outputs("--samples", metavar="FILE.jsonl", help="every completion with its numbers")
    outputs("--report", metavar="FILE.html", help="one page with plots and the worst examples")
    outputs("--no_record", action="store_true", help="keep no numbers beside the versions")

    sampling = parser.add_argument_group("sampling").add_argument
    sampling("--temperature", type=float, default=0.0, metavar="T", help="default 0, greedy")
    sampling("--top_p", type=float, default=1.0, metavar="P", help="nucleus; 1 is all")
    sampling("--max_new_tokens", type=int, default=256, metavar="N", help="longest answer (256)")
    sampling("--seed", type=int, default=0, metavar="N", help="same seed, same numbers (0)")
    add_model_options(parser)
    return parser


def _add_metric_options(parser: argparse.ArgumentParser) -> None:
    metrics = parser.add_argument_group("metrics").add_argument
    metrics(
        "--scorer", action="append", default=[], metavar="NAME[,NAME]",
        help="scorers, bleu, chrf or rouge; by default the data's own, or what its answers allow",
    )  # fmt: skip
    metrics("--rewards", metavar="YAML", help="reward functions: '[{name: keyword, args: {words: [thanks]}}]'")
    metrics("--reward_model", metavar="REF", help="score answers by a reward model, too")
    metrics("--classify", action="store_true", help="choose among the answers that occur by likelihood")
    metrics("--labels", metavar="A,B,...", help="choose among these by likelihood")
    metrics("--baseline", metavar="DATA", help="compare with classifiers without a model that learn from these rows")
    metrics("--by", action="append", default=[], metavar="KEY", help="slices: language or a key of meta")
    metrics("--no_kl", action="store_true", help="leave out the KL to parent and base")
    run_code = "let scorers run what models wrote, in a sandboxed process"
    metrics("--allow-code-execution", action="store_true", help=run_code)

    judges = parser.add_argument_group("judges of pairs against the first model").add_argument
    judges(
        "--judge", action="append", default=[], metavar="WHO",
        help="reward_model, rewards, or the URL of an OpenAI-compatible server such as http://localhost:8000/v1",
    )  # fmt: skip
    judges("--judge_model", metavar="NAME", help="the model to ask there")
    judges("--judge_timeout", type=float, default=60.0, metavar="S", help="seconds for a verdict (60)")


def _run(options: argparse.Namespace) -> int:
    from align.evaluation.session import Outputs
    from align.registry import open_registry

    if bool(options.data) == bool(options.harness):
        problem = "given beside --harness" if options.data else "missing"
        raise UsageError(
            f"--data: {problem}; give --data NAME (align data list shows some) or --harness TASK, one of them"
        )
    announce(f"evaluate: {', '.join(options.models)} on {options.data or options.harness}")
    outputs = Outputs(options.json, options.samples, options.report, record=not options.no_record)
    outputs.check()
    registry = open_registry(options.registry, base=options.base)
    if outputs.record and registry.root.is_dir():
        try:
            registry.check_writable()  # now rather than after the evaluation
        except MachineError as error:
            raise MachineError(f"{error}; --no_record evaluates without recording") from None
    from align.models.quiet_libraries import ENGINE, import_libraries

    import_libraries(*ENGINE)
    return run_benchmarks(registry, options) if options.harness else evaluate(registry, options, outputs)


def run_benchmarks(registry: Registry, options: argparse.Namespace) -> int:
    """Run public benchmarks by lm-evaluation-harness, print and record their numbers."""
    from align.evaluation.harness import Benchmarks, draw_scores, harness_record, record_harness_scores, run_harness
    from align.evaluation.session import write_json

    for switch in ("samples", "report", "judge", "scorer", "rewards", "reward_model"):
        if getattr(options, switch):
            raise UsageError(f"--{switch}: not with --harness, which has tasks and metrics of its own; leave one out")
    copied = ("include_path", "limit", "num_fewshot", "chat_template", "batch_size")
    benchmarks = Benchmarks(tuple(_split_words([options.harness])), **{name: getattr(options, name) for name in copied})
    scores = run_harness(registry, options.models, benchmarks, precision_from(options))
    write(draw_scores(scores))
    if options.json:
        models = [{"reference": one.checkpoint.reference, **harness_record(one)} for one in scores]
        write_json(options.json, {"models": models})
    if not options.no_record:
        print_recorded(record_harness_scores(registry, scores))
    return 0


def read_request(options: argparse.Namespace) -> EvaluationRequest:
    """Return the evaluation request of the options; UsageError for options that contradict each other."""
    from align.engine.protocol import Sampling
    from align.evaluation.request import EvaluationRequest
    from align.rewards.weighted_rewards import RewardSettings

    if options.limit is not None and options.limit < 2:
        raise UsageError(f"--limit {options.limit}: an interval takes two records or more")
    rewards = load_yaml(options.rewards, "--rewards") if options.rewards else []
    if not isinstance(rewards, list) or not all(isinstance(one, dict) for one in rewards):
        raise UsageError("--rewards: not a list; write '[{name: length, args: {target: 20}}]'")
    return EvaluationRequest(
        data=options.data,
        sampling=Sampling(options.temperature, options.top_p, options.max_new_tokens),
        seed=options.seed,
        limit=options.limit,
        on_bad_row=options.on_bad_row,
        scorers=tuple(_split_words(options.scorer)),
        rewards=tuple(build(RewardSettings, one) for one in rewards),
        reward_model=options.reward_model,
        labels=tuple(_split_words([options.labels or ""])),
        classify=options.classify,
        baseline=options.baseline,
        kl=not options.no_kl,
        by=tuple(_split_words(options.by)),
        allow_code=options.allow_code_execution,
        precision=precision_from(options),
    )


def _split_words(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(word.strip() for text in texts for word in text.split(",") if word.strip()))


def evaluate(registry: Registry, options: argparse.Namespace, outputs: Outputs) -> int:
    """Evaluate, print and record."""
    from align.evaluation import session
    from align.evaluation.jsonl_store import JsonlStore
    from align.evaluation.terminal_tables import draw_result

    verdicts = JsonlStore(registry.cache_dir / "verdicts.jsonl")
    request, judges = read_request(options), read_judges(options, verdicts)
    evaluation = session.evaluate(registry, options.models, request, judges)
    write(draw_result(evaluation.result))
    for note in [*evaluation.result.notes, *(note for model in evaluation.result.models for note in model.notes)]:
        write(f"note: {note}")
    recorded = session.save_evaluation(registry, evaluation, outputs)
    if outputs.report:
        write(f"report: {outputs.report}")
    print_recorded(recorded)
    session.require_verdicts(evaluation.result)
    if judges and not any(one.has_failures for model in evaluation.result.models for one in model.judged):
        verdicts.forget()
    return 0


def read_judges(options: argparse.Namespace, store: JsonlStore | None = None) -> dict[str, Judge | str]:
    """Return judges by name: metrics, or servers to ask; UsageError for an invalid one."""
    from align.evaluation.remote_judge import judge_at

    if options.judge and len(options.models) < 2:
        raise UsageError("--judge: a judge compares models with the first one; give two models or more")
    if not options.judge_timeout > 0:
        raise UsageError(f"--judge_timeout {options.judge_timeout:g}: give seconds, more than 0")
    judges: dict[str, Judge | str] = {}
    for who in options.judge:
        if who == "reward_model":  # it judges wherever it scores
            if not options.reward_model:
                raise UsageError("--judge reward_model: which one; give --reward_model REF")
        elif who == "rewards":
            if not options.rewards:
                raise UsageError("--judge rewards: which ones; give --rewards '[{name: ...}]'")
            judges["rewards"] = "reward"
        else:
            judge = judge_at(who, options.judge_model, options.judge_timeout, store)
            twin = judge.model in (options.reward_model, *judges)
            judges[f"{judge.model} at {who}" if twin else judge.model] = judge
    return judges


def print_recorded(recorded: list[str]) -> None:
    """Print which versions have new numbers."""
    if recorded:
        write(f"recorded beside {', '.join(recorded)}; align registry show {recorded[0]}")


if __name__ == "__main__":
    sys.exit(main())
