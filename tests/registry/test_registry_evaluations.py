"""Evaluation records: beside a version, never in it; shown, checked, and left alone by what moves versions."""

from __future__ import annotations

import json

import pytest

from align.errors import UsageError
from align.registry import evaluations, open_registry, upkeep
from align.registry.__main__ import main

GOLD = {"name": "gold", "value": 0.875, "low": 0.85, "high": 0.9}
FIELDS = {"headline": GOLD, "data": {"name": "prompts", "rows": 12}}


@pytest.fixture
def version(registry, commit):
    base = commit(registry, "base", "pretrain", "base")
    return commit(registry, "m", parents=[{"reference": base.reference, "digest": base.digest}])


def test_a_record_is_read_back_and_the_version_stays_what_it_was(registry, version):
    before = version.digest

    first = evaluations.add_record(registry, version, FIELDS)
    evaluations.add_record(registry, version, {**FIELDS, "headline": {**GOLD, "value": 0.9}})

    assert [record["headline"]["value"] for record in evaluations.read_records(version)] == [0.875, 0.9]
    assert first.parent.name == "v0001.evaluations"
    assert registry.resolve("m").digest == before
    assert registry.verify() == []
    assert upkeep.examine(registry) == []
    assert upkeep.find_garbage(registry) == []


def test_the_same_numbers_are_not_kept_twice(registry, version):
    first, again = (evaluations.add_record(registry, version, FIELDS) for _ in range(2))

    assert again == first
    assert len(evaluations.read_records(version)) == 1


def test_what_is_no_version_of_this_registry_keeps_none(registry, version, tmp_path):
    other = open_registry(tmp_path / "other")

    with pytest.raises(UsageError, match="is no version of"):
        evaluations.add_record(other, version, FIELDS)


def test_a_changed_record_is_told_not_shown_and_quarantined(registry, version):
    path = evaluations.add_record(registry, version, FIELDS)
    path.write_text(path.read_text().replace("0.875", "0.975"))

    assert evaluations.read_records(version) == []
    assert registry.verify() == [f"{path}: is not as it was written"]
    (finding,) = upkeep.examine(registry)
    assert (finding.trouble, finding.wrong) == ("evaluation", True)
    upkeep.repair(registry, [finding])
    assert upkeep.examine(registry) == []


def test_half_a_record_of_a_killed_process_is_no_record(registry, version):
    path = evaluations.add_record(registry, version, FIELDS)
    (path.parent / f".{path.name}.{'a' * 32}.tmp").write_text('{"format"')

    assert len(evaluations.read_records(version)) == 1
    assert registry.verify() == []
    assert [finding for finding in upkeep.examine(registry) if finding.wrong] == []


def test_show_lineage_and_ls_tell_the_newest_number(registry, version, capsys):
    evaluations.add_record(registry, version, FIELDS)

    def run(*words):
        assert main([*words, "--registry", str(registry.root)]) == 0
        return capsys.readouterr().out

    assert "gold 0.875 [0.850, 0.900] on prompts" in run("show", "m")
    assert json.loads(run("show", "m", "--json"))["evaluations"][0]["headline"] == GOLD
    first = run("lineage", "m").splitlines()[0]
    assert first == "m@v1  (sft, policy, gold 0.875 [0.850, 0.900] on prompts)"
    assert json.loads(run("lineage", "m", "--json"))["evaluation"].startswith("gold 0.875")
    assert "gold 0.875" in run("ls")
    assert json.loads(run("ls", "--json"))[1]["evaluation"] == {**GOLD, "data": "prompts"}


def test_secrets_do_not_enter_a_record(registry, version):
    path = evaluations.add_record(registry, version, {**FIELDS, "judge": {"api_key": "sk-abcdef1234567890"}})

    assert "sk-abcdef" not in path.read_text()


def test_a_version_is_exported_and_removed_as_before(registry, version, tmp_path):
    evaluations.add_record(registry, version, FIELDS)

    assert main(["export", "m", str(tmp_path / "m.tar"), "--registry", str(registry.root)]) == 0
    assert main(["rm", "m@v1", "--registry", str(registry.root)]) == 0
    assert [finding for finding in upkeep.examine(registry) if finding.wrong] == []

    other = tmp_path / "other"
    assert main(["import", str(tmp_path / "m.tar"), "--registry", str(other)]) == 0
    assert evaluations.read_records(open_registry(other).resolve("m")) == []
