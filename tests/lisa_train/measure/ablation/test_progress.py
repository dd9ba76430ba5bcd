"""How far an ablation is, where no bar can be drawn."""

from types import SimpleNamespace

from lisa_train.measure.ablation import progress
from lisa_train.measure.ablation.progress import Progress


def test_lines_tell_the_time_left_early_and_then_at_every_tenth(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with Progress(200, "ablation of 30 units", None) as bar:
        for _ in range(200):
            clock[0] += 3
            bar.add(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "ablation of 30 units 2%, 588 s left"  # after 12 s of 600
    assert lines[1] == "ablation of 30 units 10%, 540 s left"
    assert lines[-1] == "ablation of 30 units 100%, 0 s left"
    assert len(lines) == 11


def test_what_is_quick_has_no_early_line(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with Progress(4, "ablation", None) as bar:
        for _ in range(4):
            clock[0] += 4
            bar.add(1)
    assert [x.split(",")[0] for x in capsys.readouterr().err.splitlines()] == [
        "ablation 25%", "ablation 50%", "ablation 75%", "ablation 100%"
    ]  # fmt: skip
    with Progress(4, "ablation", False) as bar:
        bar.add(4)
    assert capsys.readouterr().err == ""
