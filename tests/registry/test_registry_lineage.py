from __future__ import annotations

import dataclasses
import shutil

import pytest


@pytest.fixture
def pipeline(registry, commit):
    """base -> sft -> reward -> ppo, where ppo has two parents; returns the checkpoints by name."""
    made = {}

    def make(name, stage, kind, *parents):
        recorded = [{"reference": made[parent].reference, "digest": made[parent].digest} for parent in parents]
        base = {} if kind == "base" else {"base": {"reference": made["base"].reference}}
        made[name] = commit(registry, name, stage, kind, parents=recorded, **base)

    make("base", "pretrain", "base")
    make("support-sft", "sft", "policy")
    make("support-reward", "reward", "reward", "support-sft")
    make("support-ppo", "ppo", "policy", "support-sft", "support-reward")
    return made


def _names(tree):
    return {tree.reference: [_names(parent) for parent in tree.parents]}


def test_four_stages_are_traced_to_the_base(registry, pipeline):
    tree = registry.lineage(pipeline["support-ppo"])

    sft = {"support-sft@v1": [{"base@v1": []}]}
    assert _names(tree) == {"support-ppo@v1": [sft, {"support-reward@v1": [sft]}]}
    assert dataclasses.asdict(tree)["parents"][1]["stage"] == "reward"
    assert registry.verify() == []


def test_a_parent_that_is_gone_is_shown_and_verify_tells(registry, pipeline):
    shutil.rmtree(registry.root / "models" / "support-reward")

    reward = registry.lineage(pipeline["support-ppo"]).parents[1]

    assert (reward.reference, reward.note, reward.parents) == ("support-reward@v1", "is not here or is damaged", ())
    assert registry.verify() == ["support-ppo@v1: its parent support-reward@v1 is not here or is damaged"]


def test_a_parent_replaced_by_another_of_its_name_is_noticed(registry, pipeline, commit):
    shutil.rmtree(registry.root / "models" / "support-reward")
    commit(registry, "support-reward", "reward", "reward")

    assert registry.lineage(pipeline["support-ppo"]).parents[1].note == "has changed since"
    assert registry.verify() == ["support-ppo@v1: its parent support-reward@v1 has changed since"]


def test_a_parent_elsewhere_may_go_without_a_problem(registry, commit, tmp_path):
    child = commit(registry, "m", base={"reference": str(tmp_path / "gone")})

    assert registry.lineage(child).parents[0].note == "is not here or is damaged"
    assert registry.verify() == []


def test_a_lineage_that_leads_back_to_itself_ends(registry, commit):
    child = commit(registry, "m", parents=[{"reference": "m"}])

    assert _names(registry.lineage(child)) == {"m@v1": [{"m@v1": []}]}
