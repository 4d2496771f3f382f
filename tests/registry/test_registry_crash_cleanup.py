"""Power cuts at every durable operation of rm, import and doctor --repair, with negative controls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from lossy_disk import OUTCOMES, FastDisk, Forgets, LossyDisk, PowerCut
from small_models import write_model

from align.registry import Registry, archive, open_registry, upkeep
from align.registry.archive import export_version
from align.registry.durable import hash_file, verify_seal


@dataclass(frozen=True)
class Scenario:
    """What is there, what is done while the power goes, and what may be found afterwards."""

    prepare: Callable[[Registry], None]
    act: Callable[[Registry], object]
    damage: Callable[[Registry, bool], list[str]]


def _commit(registry: Registry, name: str, content: bytes = b"weights", kind: str = "policy") -> None:
    with registry.stage(name) as staging:
        write_model(staging.path, content, kind)
        staging.commit({"stage": "sft", "kind": kind})


def cut_power_everywhere(work: Path, scenario: Scenario, forgets: Forgets = lambda what, path: False) -> Iterator[list]:
    """Yield what is broken after a cut at each step in turn; the last step is right after everything succeeded."""
    for cut_at in itertools.count(1):
        root = work / str(cut_at) / "registry"
        root.parent.mkdir(parents=True)
        disk = LossyDisk(root, forgets)
        registry = open_registry(root, disk)
        scenario.prepare(registry)
        disk.steps, disk.cut_at = 0, cut_at
        finished = False
        try:
            scenario.act(registry)
            finished = True
            disk.cut_power()
        except PowerCut:
            pass
        images = [(outcome, open_registry(disk.image(outcome), FastDisk())) for outcome in OUTCOMES]
        yield [f"{outcome}: {what}" for outcome, image in images for what in scenario.damage(image, finished)]
        if finished:
            return


def _two_versions(registry: Registry) -> None:
    _commit(registry, "m", b"first")
    _commit(registry, "m", b"second")


def _after_removal(image: Registry, finished: bool) -> list[str]:
    """m@v1 is in its place or in the trash, whole; its number is not given again."""
    found = [*image.verify()]
    in_place = "m@v1" in [version.reference for version in image.versions("m")]
    in_trash = any(not verify_seal(folder, "manifest.json") for folder in image.root.glob("trash/*/v0001"))
    if not in_place and not in_trash:
        found.append("m@v1 is lost")
    if finished and in_place:
        found.append("the removal was acknowledged and came undone")
    _commit(image, "m")
    next_one = image.resolve("m").reference
    return found if next_one == "m@v3" else [*found, f"the next version is {next_one}"]


def _import_scenario(tmp_path: Path) -> Scenario:
    """A base and its adapter come from a registry on another machine."""
    origin = open_registry(tmp_path / "origin", FastDisk())
    _commit(origin, "base", b"base", "base")
    with origin.stage("m") as staging:
        write_model(staging.path, b"adapter")
        staging.commit({"stage": "sft", "kind": "policy", "base": {"reference": "base@v1"}})
    export_version(origin, "m@v1", tmp_path / "m.tar", with_base=True)
    wanted = {name: origin.resolve(name).digest for name in ("base", "m")}

    def damage(image: Registry, finished: bool) -> list[str]:
        found = [*image.verify()]
        if finished and {name: image.resolve(name).digest for name in image.names()} != wanted:
            found.append("the import was acknowledged and is lost")
        archive.import_file(image, tmp_path / "m.tar")
        again = [version.reference for name in image.names() for version in image.versions(name)]
        return found if again == ["base@v1", "m@v1"] else [*found, f"a second import makes {again}"]

    return Scenario(lambda registry: None, lambda registry: archive.import_file(registry, tmp_path / "m.tar"), damage)


_TORN = b"cut"


def _damaged(registry: Registry) -> None:
    _two_versions(registry)
    registry.set_alias("m", "best", 2)
    weights = registry.root / "models/m/v0002/adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(_TORN)
    registry.disk.sync_file(weights)


def _after_repair(image: Registry, finished: bool) -> list[str]:
    """Nothing is lost: not the whole version, not what is left of the torn one, not what the alias said."""
    found = [] if "m@v1" in [version.reference for version in image.versions("m")] else ["m@v1 is lost"]
    torn = [*image.root.glob("models/m/v0002/adapter*.safetensors"), *image.root.glob("quarantine/*/v0002/adapter*.s*")]
    if not any(path.read_bytes() == _TORN for path in torn):
        found.append("what was left of m@v2 is lost")
    alias = [*image.root.glob("refs/m/best"), *image.root.glob("quarantine/*/best")]
    if not any(path.read_text().startswith("v0002 sha256:") for path in alias):
        found.append("what the alias said is lost")
    if finished and "m@v2" in [version.reference for version in image.all_versions()]:
        found.append("the repair was acknowledged and came undone")
    upkeep.repair(image, upkeep.examine(image))
    return found + [finding.what for finding in upkeep.examine(image) if finding.wrong]


REMOVAL = Scenario(_two_versions, lambda registry: upkeep.remove_version(registry, "m@v1"), _after_removal)
REPAIR = Scenario(_damaged, lambda registry: upkeep.repair(registry, upkeep.examine(registry)), _after_repair)


def _scenario(name: str, tmp_path: Path) -> Scenario:
    return {"rm": REMOVAL, "doctor --repair": REPAIR}.get(name) or _import_scenario(tmp_path)


@pytest.mark.parametrize("name", ["rm", "import", "doctor --repair"])
def test_a_power_cut_at_any_step_loses_nothing_and_tears_nothing(tmp_path, name):
    found = list(cut_power_everywhere(tmp_path / "work", _scenario(name, tmp_path)))

    assert [(step, broken) for step, broken in enumerate(found, start=1) if broken] == []
    assert len(found) > 8


CONTROLS = {
    "rm: its place in the trash is not synced": lambda what, path: what == "folder" and path.parent.name == "trash",
    "rm: the trash is not synced": lambda what, path: what == "folder" and path.name == "trash",
    "rm: the place it left is not synced": lambda what, path: what == "folder" and path.name == "m",
    "import: unpacked files are not synced": lambda what, path: what == "file" and path.suffix == ".safetensors",
    "import: the manifest is not synced": lambda what, path: what == "file" and "manifest.json" in path.name,
    "import: the versions' folder is not synced": lambda what, path: what == "folder" and path.name == "m",
    "doctor --repair: quarantine is not synced": lambda what, path: what == "folder" and path.name == "quarantine",
    "doctor --repair: a place in it is not synced": (
        lambda what, path: what == "folder" and path.parent.name == "quarantine"
    ),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_negative_control_a_missing_sync_is_seen(tmp_path, control):
    scenario = _scenario(control.partition(":")[0], tmp_path)

    found = cut_power_everywhere(tmp_path / "work", scenario, CONTROLS[control])

    assert any(found)


def test_the_whole_tar_is_there_or_none_of_it(tmp_path):
    registry = open_registry(tmp_path / "registry", FastDisk())
    _commit(registry, "m")
    registry.resolve("m").check(hashes=True)

    export_version(registry, "m", tmp_path / "m.tar")
    export_version(registry, "m", tmp_path / "again.tar")

    assert hash_file(tmp_path / "m.tar") == hash_file(tmp_path / "again.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.tar", "m.tar", "registry"]
