"""`lisa-analyze`: what it prints, what it writes, and how it fails."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lisa_analysis as la
from lisa_analysis.rundir.opening import runs_at
from lisa_analysis.views.cli import main
from lisa_analysis.views.next_run import AskedExport
from lisa_analysis.views.terminal import bar

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "golden-run"


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy of the committed run, so that its report lands elsewhere."""
    return Path(shutil.copytree(GOLDEN, tmp_path / "golden"))


def test_one_run_is_printed_as_findings_layers_and_verdict(
    golden: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(golden)]) == 0
    printed = capsys.readouterr().out
    profile = la.importance(la.load(golden)).to_frame()
    top = int(profile["score"].idxmax())
    rows = [line for line in printed.splitlines() if line.startswith("model.layers.")]
    assert len(rows) == 8
    assert rows[top].count("█") == 24
    for row, score in zip(rows, profile["score"], strict=True):
        assert row.split()[1] == f"{score:.3g}"
    ratio = la.importance(la.load(golden)).concentration.ends_to_middle.value
    assert f"score ×{ratio:.2f}" in printed
    assert printed.rstrip().endswith(str(golden / "report.html"))
    assert (golden / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_bottom_and_top_are_those_of_a_stack_that_is_known() -> None:
    from lisa_analysis.views import terminal

    def said(names: list[str], scores: list[float]) -> str:
        return terminal.ends_to_middle(la.ImportanceProfile.from_scores(scores, names))

    layers = [f"model.layers.{i}" for i in range(8)]
    assert "×4.00 (no interval)" in said(layers, [4.0, 1, 1, 1, 1, 1, 1, 4])
    # The last layers alone trained: their first is not the bottom of the stack.
    assert "unknown" in said(layers, [float("nan")] * 4 + [4.0, 1, 1, 4])
    # An encoder and a decoder have no common depth.
    two = [f"{part}.block.{i}" for part in ("encoder", "decoder") for i in range(4)]
    assert said(two, [4.0, 1, 1, 1, 1, 1, 1, 4]) == ""


def test_everything_is_written_where_it_was_asked_for(golden: Path, tmp_path: Path) -> None:
    paths = {name: tmp_path / name for name in ("r.html", "all.json", "p.json")}
    words = [str(golden), "-o", str(paths["r.html"]), "--json", str(paths["all.json"]),
             "--probabilities", str(paths["p.json"]), "--activated-layers", "3",
             "--metric", "update_ratio", "--ignore-intervals"]  # fmt: skip
    assert main(words) == 0
    content = json.loads(paths["all.json"].read_text())
    (run,) = content["runs"]
    assert run["profile"]["metric"] == "update_ratio"
    assert len(run["profile"]["layers"]) == 8
    assert {finding["state"] for finding in run["findings"]} <= {
        "ok", "info", "warn", "fail", "could not run"
    }  # fmt: skip
    probabilities = la.SamplingProbabilities.load(paths["p.json"])
    assert sum(probabilities.inclusion_probabilities) == pytest.approx(3, abs=1e-12)
    assert len(set(probabilities.inclusion_probabilities)) > 1
    assert list(probabilities.inclusion_probabilities) == pytest.approx(
        run["probabilities"]["inclusion_probabilities"]
    )


def test_several_runs_are_put_side_by_side(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(GOLDEN, tmp_path / "other"))
    path = tmp_path / "all.json"
    assert main([str(golden), str(other), "--json", str(path)]) == 0
    comparison = json.loads(path.read_text())["comparison"]
    assert [run["run"] for run in comparison["runs"]] == ["golden", "other"]
    assert comparison["rank_agreement"][0]["kendall"] == pytest.approx(1)
    printed = capsys.readouterr().out
    line = next(x for x in printed.splitlines() if x.startswith("other "))
    last = la.load(golden).events.query("event == 'evaluate'")["metrics"].iloc[-1]["eval_loss"]
    assert f"{last:.4f}" in line
    assert "held-out loss" in printed
    assert "peak memory" in printed
    assert (tmp_path / "report.html").exists()


def test_a_folder_stands_for_the_runs_directly_in_it(
    make_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "all"
    (runs / "notes").mkdir(parents=True)
    (runs / "readme.txt").write_text("no run")
    for name in ("b", "a"):
        shutil.copytree(make_run(steps=20).path, runs / name)
    (runs / "b" / "inner").mkdir()
    shutil.copy(runs / "a" / "run.json", runs / "b" / "inner")  # within a run: not asked for
    assert runs_at(runs) == [runs / "a", runs / "b"]
    assert runs_at(runs / "b") == [runs / "b"]
    assert main([str(runs)]) == 0
    folder = capsys.readouterr().out
    assert folder.rstrip().endswith(str(runs / "report.html"))
    assert main([str(runs / "a"), str(runs / "b")]) == 0
    assert capsys.readouterr().out == folder


def test_the_metric_is_that_of_the_comparison_too(golden: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(GOLDEN, tmp_path / "other"))
    path = tmp_path / "all.json"
    words = [str(golden), str(other), "--json", str(path), "--metric", "update_ratio"]
    assert main(words) == 0
    content = json.loads(path.read_text())
    assert {run["profile"]["metric"] for run in content["runs"]} == {"update_ratio"}
    assert content["comparison"]["metric"] == "update_ratio"


SKEW = Path(__file__).resolve().parents[3] / "reports" / "2026-11-23-skew" / "runs"


def test_seeds_of_one_arm_give_one_profile_and_its_probabilities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [SKEW / f"full-{seed}" for seed in (1, 2, 3)]
    paths = {name: tmp_path / name for name in ("r.html", "all.json", "p.json")}
    words = ["-o", str(paths["r.html"]), "--json", str(paths["all.json"]),
             "--probabilities", str(paths["p.json"])]  # fmt: skip
    assert main([*map(str, runs), *words]) == 0
    profile = la.importance(runs)
    saved = la.SamplingProbabilities.load(paths["p.json"])
    plan = la.sampling_probabilities(profile, 2)
    assert saved.source_runs == tuple(la.load(run).run_id for run in runs) == profile.sources
    assert saved.inclusion_probabilities == pytest.approx(plan.inclusion_probabilities)
    content = json.loads(paths["all.json"].read_text("utf-8"))["over_seeds"]
    assert content["profile"] == json.loads(json.dumps(profile.to_dict()))
    assert content["probabilities"]["source_runs"] == list(saved.source_runs)
    printed = " ".join(capsys.readouterr().out.split())
    assert profile.statement in printed
    page = paths["r.html"].read_text("utf-8")
    assert "Over 3 seeds: intervals are for the mean over seeds" in page
    assert "Importance of each layer over 3 seeds" in page


def test_runs_of_several_arms_give_no_probabilities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(SKEW / name) for name in ("full-1", "lora-1")]
    words = ["--probabilities", str(tmp_path / "p.json"), "-o", str(tmp_path / "r.html")]
    assert main([*runs, *words]) == 2
    assert "differ in the method (full, lora)" in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()
    assert main([*runs, *words[2:], "--json", str(tmp_path / "all.json")]) == 0
    assert json.loads((tmp_path / "all.json").read_text("utf-8"))["over_seeds"] is None


def test_strength_and_control_reach_the_file_the_report_and_the_screen(
    make_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(profile=np.exp(np.linspace(-1, 1, 12)), steps=200)
    path, report = tmp_path / "p.json", tmp_path / "r.html"
    words = [str(run.path), "--probabilities", str(path), "-o", str(report)]
    assert main([*words, "--strength", "4"]) == 0
    made = la.SamplingProbabilities.load(path)
    assert (made.strength, made.mix) == (4.0, 0.0625)
    assert made == dataclasses.replace(
        la.sampling_probabilities(la.importance(run), 2, strength=4), created=made.created
    )
    printed = " ".join(capsys.readouterr().out.split())
    assert f"4 ×{made.gain:.2f}" in printed
    html = report.read_text(encoding="utf-8")
    assert "What each strength would give" in html
    assert "This file: strength 4." in html
    assert main([*words, "--strength", "pool=3"]) == 0
    pool = la.SamplingProbabilities.load(path)
    assert pool.never_drawn == tuple(range(9))
    assert main([*words, "--strength", "4", "--control", "permuted", "--control-seed", "7"]) == 0
    placebo = la.SamplingProbabilities.load(path)
    assert (placebo.control, placebo.seed) == ("permuted", 7)
    assert sorted(placebo.inclusion_probabilities) == sorted(made.inclusion_probabilities)
    assert placebo.inclusion_probabilities != made.inclusion_probabilities
    assert "A permuted control of seed 7" in " ".join(capsys.readouterr().out.split())
    assert "What each strength would give" not in report.read_text(encoding="utf-8")


def test_commas_in_the_name_of_a_file_are_part_of_it() -> None:
    for path in ("sweep/layers=3,layers=4/f.json", "a,b.json", "lr=0.1,seed-2.json"):
        assert AskedExport.read(f"freeze,layers=3:{path}").path == Path(path)


def test_a_seed_without_a_control_is_refused(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(golden), "--probabilities", str(tmp_path / "p.json"), "--control-seed", "0"]
    assert main(words) == 2
    assert "--control-seed is 0, but" in (said := capsys.readouterr().err)
    assert said.rstrip().endswith("needs --control permuted.")
    assert not (tmp_path / "p.json").exists()
    assert not (golden / "report.html").exists()


def test_probabilities_and_their_export_are_one_file(make_run, tmp_path: Path) -> None:
    run = make_run(profile=np.exp(np.linspace(-1, 1, 12)), steps=40, k=4, method="lisa")
    paths = [tmp_path / "p.json", tmp_path / "exported.json"]
    words = [str(run.path), "-o", str(tmp_path / "r.html"), "--probabilities", str(paths[0]),
             "--export", f"probabilities:{paths[1]}"]  # fmt: skip
    for more, k in (([], 4), (["--activated-layers", "3"], 3)):
        assert main([*words, *more]) == 0
        made = [la.SamplingProbabilities.load(path) for path in paths]
        assert made[0].activated_layers == k
        assert made[0] == dataclasses.replace(made[1], created=made[0].created)


def test_exports_are_written_and_said(
    make_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(profile=np.exp(np.linspace(-1, 1, 12)), steps=200)
    lora, rates, freeze = (tmp_path / name for name in ("lora.json", "lr.json", "freeze.json"))
    words = [str(run.path), "-o", str(tmp_path / "r.html"), "--export",
             f"peft-rank,r=4,target_modules=q_proj:{lora}", "--export", f"lr:{rates}",
             "--export", f"freeze,layers=3:{freeze}"]  # fmt: skip
    assert main(words) == 0
    profile = la.importance(run)
    made = la.export(profile, "peft-rank", run=run, r=4, target_modules="q_proj")
    assert json.loads(lora.read_text()) == made.values
    about = json.loads((tmp_path / "lora.about.json").read_text())
    assert about["source_runs"] == [run.run_id]
    multipliers = json.loads(rates.read_text())["multipliers"]
    assert multipliers["11"] > 2 * multipliers["0"]
    assert json.loads(freeze.read_text())["train"]["layers"] == [9, 10, 11]
    printed = " ".join(capsys.readouterr().out.split())
    assert f"peft-rank: {made.statement}" in printed
    assert f"peft-rank: {lora}" in printed


def test_an_undecided_export_says_so_on_the_screen(
    make_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(profile=12, steps=4)
    path = tmp_path / "a.yaml"
    words = [str(run.path), "-o", str(tmp_path / "r.html"), "--export", f"axolotl:{path}"]
    assert main(words) == 0
    assert path.read_text("utf-8").count("^model.layers.") == 12
    printed = " ".join(capsys.readouterr().out.split())
    assert "axolotl: Undecided: the data are insufficient for intervals" in printed


def test_an_undecided_run_gives_the_same_words_everywhere(
    make_run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(profile=12, steps=4)
    path, report = tmp_path / "p.json", tmp_path / "r.html"
    assert main([str(run.path), "--probabilities", str(path), "-o", str(report)]) == 0
    made = la.SamplingProbabilities.load(path)
    assert set(made.inclusion_probabilities) == {2 / 12}
    said = f"the probabilities are uniform: {made.undecided}."
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{said} --ignore-intervals takes the scores as certain." in printed
    assert said in made.statement
    assert said in report.read_text(encoding="utf-8")


@pytest.mark.parametrize(("level", "code"), [("never", 0), ("warn", 1), ("fail", 0)])
def test_fail_on_sets_the_exit_code(level: str, code: int, golden: Path) -> None:
    states = {finding.state for finding in la.diagnose(la.load(golden)).findings}
    assert "warn" in states
    assert "fail" not in states
    assert main([str(golden), "--fail-on", level]) == code


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "nowhere does not exist"),
        (["{tmp}"], "{tmp}"),
        (["{run}", "--metric", "grad_rsm"], "grad_rms"),
        (["{run}", "--activated-layers", "9"], "9"),
        (["{run}", "--activated-layers", "0"], "expected at least 1"),
        (["{run}", "{run}", "--probabilities", "p.json"], "have the same seed"),
        (["{tmp}"], "no folder directly in it does"),
        (["{run}", "--fail-on", "wrn"], "one of never, warn, fail. Did you mean 'warn'?"),
        (["{run}", "--fail_on", "warn"], "Did you mean '--fail-on'?"),
        (["{run}", "--zzz"], "no option --zzz. See lisa-analyze --help."),
        ([], "RUN_DIR; see lisa-analyze --help."),
        (["{run}", "--strength", "17"], "strength is 17.0: expected a number from 0 to 16"),
        (["{run}", "--strength", "pol"], "'pool' or 'pool=6'"),
        (["{run}", "--export", "peft-rank"], "expected KIND:FILE"),
        (["{run}", "--export", "peftrank:f"], "Did you mean 'peft-rank'"),
        (["{run}", "--export", "lr,head:f"], "expected OPTION=VALUE"),
        (["{run}", "--export", "lr,heads=1:f"], "Did you mean 'head'"),
        (["{run}", "--export", "lr,head=1,head=2:f"], "the option 'head' twice"),
        (["{run}", "--export", "lr,strength=2:f"], "is one of the whole command: see --strength"),
        (["{run}", "--export", "freeze:f.json,layers=3"], "--export freeze,layers=3:f.json."),
        (["{run}", "--export", "freeze:f.json,strength=3"], "'strength' after the file"),
        (["{run}", "--export", "freeze,layers=9:{tmp}/f"], "layers is 9"),
        (["{run}", "--export", "lr:{tmp}/no/such/f"], "no/such"),
        (["{run}", "--strength", "pool=1", "--ignore-intervals"], "activated_layers is 2"),
        (["{run}", "--strength", "pool"], "names no layers for a pool"),
        (["{run}", "-o", "{tmp}/no/such/folder/r.html"], "no/such/folder"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    words: list[str],
    expected: str,
    golden: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    places = {"{run}": str(golden), "{tmp}": str(empty)}

    def fill(text: str) -> str:
        for mark, path in places.items():
            text = text.replace(mark, path)
        return text

    assert main([fill(word) for word in words]) == 2
    message = capsys.readouterr().err
    assert message.startswith("lisa-analyze: ")
    assert message.count("\n") == 1
    assert fill(expected) in message


def test_quiet_prints_the_files_alone_and_verbose_every_rule(
    golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(golden), "-o", str(tmp_path / "r.html")]
    assert main([*words, "-q"]) == 0
    assert capsys.readouterr().out == f"report:        {tmp_path / 'r.html'}\n"
    assert main([*words, "--verbose"]) == 0
    printed = capsys.readouterr().out
    for finding in la.diagnose(la.load(golden)).findings:
        assert f"{finding.title}: {finding.evidence}" in printed
        assert f"fires at: {finding.threshold}" in printed
    assert main([*words, "-q", "-v"]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_it_also_runs_as_a_module_and_says_what_it_takes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lisa_analysis", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for option in ("--probabilities", "--json", "--metric", "--activated-layers", "--fail-on"):
        assert option in done.stdout


def test_help_names_the_metric_that_each_kind_of_log_is_profiled_by(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    first = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help", "all"])
    whole = capsys.readouterr().out
    assert "grad_rms" in first
    assert "grad_signal" in first
    for metric in ("grad_rms", "grad_signal", "delta_rel", "delta_norm", "base_norm"):
        assert metric in whole


@pytest.mark.parametrize(
    ("share", "drawn"), [(0, ""), (1, "█" * 24), (0.5, "█" * 12), (1 / 192, "▏"), (-1, "")]
)
def test_bars_are_as_long_as_the_share(share: float, drawn: str) -> None:
    assert bar(share) == drawn


@pytest.mark.parametrize("kept", [(), ("metrics/part-000-00000000.parquet",)])
def test_a_run_without_a_profile_is_reported_all_the_same(kept, golden, tmp_path, capsys):
    begun = tmp_path / "begun"
    (begun / "metrics").mkdir(parents=True)
    for name in ("run.json", "parameters.parquet", *kept):
        shutil.copy(golden / name, begun / name)
    found = tmp_path / "found.json"
    assert main([str(begun), "--json", str(found)]) == 0
    assert "No profile: importance metric 'grad_rms' cannot be computed" in capsys.readouterr().out
    assert (begun / "report.html").is_file()
    [run] = json.loads(found.read_text(encoding="utf-8"))["runs"]
    assert run["profile"] is None
    assert "grad_norm was not recorded" in run["why_not"]
    assert main([str(begun), str(golden), "-o", str(tmp_path / "both.html")]) == 0
    assert main([str(begun), "--probabilities", str(tmp_path / "p.json")]) == 2
    assert main([str(begun), "--metric", "grad_rms"]) == 2


def test_a_reader_that_stops_early_and_a_poor_terminal_do_no_harm(golden, tmp_path):
    command = [sys.executable, "-m", "lisa_analysis", str(golden), "-o", str(tmp_path / "r.html")]
    whole = subprocess.run(
        command, capture_output=True, check=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert b"\\u2016" in whole.stdout
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does once it has its lines
    try:
        cut = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writing)
    assert (cut.returncode, cut.stderr) == (0, b"")
