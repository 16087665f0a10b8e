"""Curves drawn from metrics.jsonl: what is in the picture is what the file says."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tracking import plots


def make_run(folder: Path, steps: int, factor: float) -> Path:
    folder.mkdir()
    lines = [{"step": step, "loss": factor / step, "lr": 0.1 * step, "time": 0.0} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_curves_are_those_of_the_files(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one", 100, 1.0), make_run(tmp_path / "two", 50, 2.0)
    results = [{"task": "validation", "global_step": step, "loss": 0.5 * step} for step in (10, 20, 20)]
    results.append({"task": "lambada", "global_step": 20, "accuracy": 0.5})  # has no loss
    (two / "eval_1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in results))
    loss, rate = plots.draw([plots.read_run(str(one)), plots.read_run(str(two))]).axes
    steps = np.arange(1, 101)
    np.testing.assert_array_equal(loss.lines[0].get_xydata(), np.stack([steps, 1 / steps], axis=1))
    drawn = loss.lines[1].get_xydata()
    np.testing.assert_allclose(np.asarray(drawn)[:3, 1], [1, (1 + 1 / 2) / 2, (1 / 2 + 1 / 3) / 2], rtol=1e-12)
    np.testing.assert_array_equal(loss.lines[4].get_xydata(), [[10, 5], [20, 10]])
    assert loss.get_legend_handles_labels()[1] == [str(one), str(two), f"{two}: validation"]
    np.testing.assert_allclose(np.asarray(rate.lines[1].get_xydata())[-1], [50, 5.0])


def test_files_that_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(make_run(tmp_path / "run <1>", 3, 1.0))
    picture, page = tmp_path / "new" / "curves.png", tmp_path / "curves.html"
    assert plots.main([run, "--output", str(picture)]) == 0
    assert capsys.readouterr().out == f"{picture}\n"
    with Image.open(picture) as image:
        assert image.size == (1350, 1050)
        assert len(image.convert("RGB").getcolors(1 << 24) or []) > 100  # something is drawn
    assert plots.main([run, run, "--output", str(page)]) == 0
    text = page.read_text()
    assert "run &lt;1&gt;" in text and "data:image/png;base64,iVBOR" in text and "<1>" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.html", "new", "run <1>"]


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(make_run(tmp_path / "run", 3, 1.0))
    (tmp_path / "file").write_text("")
    for arguments, says in (
        ([str(tmp_path)], "holds no metrics.jsonl with metrics"),
        ([run, "--output", "curves.gif"], "has no known ending; use one of .png"),
        ([run, "--output", str(tmp_path / "file" / "curves.png")], "cannot be written"),
    ):
        assert plots.main(arguments) == 2
        assert says in capsys.readouterr().err
