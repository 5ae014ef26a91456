"""Every scenario file that is found: our own in `cases`, and the shared folder where there is one (TRIMTAB_SCENARIOS)."""

import json
import os
from pathlib import Path

import pytest

from tests.scenarios.musts import MUSTS
from tests.scenarios.run import check, is_scenario, main
from tests.scenarios.schema import load

HERE = Path(__file__).resolve().parent
CASES = HERE / "cases"
SHARED = Path(os.environ.get("TRIMTAB_SCENARIOS") or HERE.parents[2] / "shared" / "scenarios")


def files() -> list[Path]:
    folders = [CASES] + ([SHARED] if SHARED.is_dir() else [])
    return [path for folder in folders for path in sorted(folder.iterdir()) if is_scenario(path)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", files(), ids=lambda path: path.stem)
def test_scenario(path: Path) -> None:
    check(load(path))


def test_a_sentence_that_nobody_mapped_is_a_failure(tmp_path: Path) -> None:
    text = (CASES / "power-loss.json").read_text().replace('"end": {', '"must": ["the moon is green"], "fin": {')
    (tmp_path / "unknown.json").write_text(text)
    with pytest.raises(AssertionError, match="the moon is green"):
        check(load(tmp_path / "unknown.json"))
    assert main(tmp_path) == 1


def test_the_runner_fails_where_a_file_fails_and_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tmp_path) == 1
    (tmp_path / "power-loss.json").write_text((CASES / "power-loss.json").read_text())
    assert main(tmp_path) == 0
    wrong = json.loads((CASES / "power-loss.json").read_text())
    wrong["expected"]["end"]["running"]["c"] = ["h3"]
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    assert main(tmp_path) == 1
    assert "FAIL      wrong" in capsys.readouterr().out


def test_every_shared_sentence_is_mapped() -> None:
    said = {one for path in files() for one in load(path)["expected"].get("must", [])}
    assert said <= set(MUSTS)
