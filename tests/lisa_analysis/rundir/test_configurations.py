"""Arms of a study by what was sampled: the content of the probabilities, never their path."""

import json
import shutil
from pathlib import Path

import pytest

import lisa_analysis as la
from lisa_analysis.contract.schema import CONFIG, EVENTS, MANIFEST
from lisa_analysis.rundir.configurations import differing, grouped, settings

STUDY = Path(__file__).parents[3] / "reports" / "2026-11-24-learned-sampling" / "runs"
ARMS = ("uniform", "learned", "permuted")
FILE = "lisa_probabilities.json"


def arms(folders):
    """Names of the runs of every arm."""
    runs = [la.load(folder) for folder in folders]
    groups = grouped([settings(run) for run in runs])
    return sorted(sorted(runs[i].path.name for i in group) for group in groups)


THREE_ARMS = sorted([f"{arm}-{seed}" for seed in (1, 2, 3, 4)] for arm in ARMS)


@pytest.fixture
def folders(tmp_path):
    """The study's runs, with the absolute paths that an ordinary run directory has."""
    found = []
    for kept in sorted(STUDY.iterdir()):
        folder = tmp_path / kept.name
        folder.mkdir()
        for name in (MANIFEST, CONFIG, EVENTS, FILE):
            shutil.copy(kept / name, folder / name)
        set_path(folder, folder / FILE)
        found.append(folder)
    return found


def set_path(folder, path):
    text = (folder / CONFIG).read_text("utf-8")
    lines = [
        f"  probabilities: {path}" if line.strip().startswith("probabilities:") else line
        for line in text.splitlines()
    ]
    (folder / CONFIG).write_text("\n".join(lines) + "\n", "utf-8")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def test_the_kept_study_has_three_arms_of_four_seeds():
    """One configuration of twelve runs before: the relative paths are equal."""
    assert arms(sorted(STUDY.iterdir())) == THREE_ARMS


def test_absolute_paths_are_one_arm_all_the_same(folders):
    """Twelve configurations before, none with an interval."""
    assert arms(folders) == THREE_ARMS


def test_a_moved_run_directory_has_its_copy(folders, tmp_path):
    for folder in folders:
        set_path(folder, f"/nowhere/{folder.name}/{FILE}")
    assert arms(folders) == THREE_ARMS


def test_where_the_file_is_gone_the_draws_tell(folders):
    """Learned and permuted never meet; a control whose file is gone cannot be known as one."""
    for folder in folders:
        (folder / FILE).unlink()
    found = arms(folders)
    assert [f"learned-{seed}" for seed in (1, 2, 3, 4)] in found
    assert [f"uniform-{seed}" for seed in (1, 2, 3, 4)] in found
    assert sum(len(group) == 1 for group in found) == 4


def test_one_file_gone_does_not_split_an_arm(folders):
    (folders[1] / FILE).unlink()
    assert folders[1].name == "learned-2"
    assert arms(folders) == THREE_ARMS


def test_another_file_at_the_path_is_not_believed(folders):
    """The draws of learned-1 are not those of the file that lies there by now."""
    shutil.copy(folders[4] / FILE, folders[0] / FILE)
    assert (folders[0].name, folders[4].name) == ("learned-1", "permuted-1")
    assert arms(folders) == THREE_ARMS


def test_without_file_and_draws_nothing_is_pooled(folders):
    for folder in folders:
        (folder / FILE).unlink()
        (folder / EVENTS).write_text("")
    assert [len(group) for group in arms(folders)] == [1] * 12


def test_the_manifest_of_a_run_without_a_configuration_serves_as_well(folders):
    for folder in folders:
        (folder / CONFIG).unlink()
        lisa = json.loads((folder / MANIFEST).read_text("utf-8"))["lisa"]
        lisa |= {"probabilities": str(folder / FILE), "seed": len(folder.name)}
        edit(folder / MANIFEST, lisa=lisa)
    assert arms(folders) == THREE_ARMS


def test_probabilities_in_the_settings_themselves(folders):
    """A list instead of a file: the numbers are the content."""
    for folder in folders[:4]:
        pi = json.loads((folder / FILE).read_text("utf-8"))["inclusion_probabilities"]
        (folder / FILE).unlink()
        (folder / EVENTS).write_text("")
        set_path(folder, "".join(f"\n  - {p}" for p in pi))
    assert arms(folders) == THREE_ARMS


def test_permutations_made_with_other_options_are_another_arm(folders):
    assert folders[5].name == "permuted-2"
    edit(folders[5] / FILE, gamma=2.0)
    found = arms(folders)
    assert ["permuted-2"] in found
    assert ["permuted-1", "permuted-3", "permuted-4"] in found


def test_a_control_is_not_what_it_controls(folders):
    """The same numbers in the same order, called reversed."""
    edit(folders[0] / FILE, control="reversed")
    assert ["learned-1"] in arms(folders)


def test_equal_probabilities_are_uniform_sampling(folders):
    """A uniform control, and LISA without any file."""
    assert folders[8].name == "uniform-1"
    set_path(folders[8], "null")
    assert arms(folders) == THREE_ARMS


@pytest.mark.parametrize("content", ["{", "[]", '{"inclusion_probabilities": ["a"]}', "\x00"])
def test_a_damaged_file_is_as_good_as_gone(folders, content):
    (folders[0] / FILE).write_text(content)
    assert arms(folders) == THREE_ARMS


def set_lisa(folder, **changes):
    """Settings of LISA, as a newer toolkit writes them into both files."""
    text = (folder / CONFIG).read_text("utf-8")
    lines = [line for line in text.splitlines() if line.split(":")[0].strip() not in changes]
    at = lines.index("lisa:") + 1
    for name, value in changes.items():
        under = value if isinstance(value, dict) else None
        lines.insert(at, f"  {name}:" + ("" if under else f" {value}"))
        for key, entry in (under or {}).items():
            lines.insert(at + 1, f"    {key}: {entry}")
    (folder / CONFIG).write_text("\n".join(lines) + "\n", "utf-8")


def test_a_control_that_the_run_itself_applied(folders):
    """The file holds the learned probabilities, and `lisa.control` permutes them by the seed."""
    learned = (folders[0] / FILE).read_text("utf-8")
    for folder in folders[4:8]:
        assert folder.name.startswith("permuted")
        (folder / FILE).write_text(learned, "utf-8")
        set_lisa(folder, control="permuted", control_seed=folder.name[-1])
    assert arms(folders) == THREE_ARMS
    # Where the file is gone the setting still tells a control.
    for folder in folders[4:8]:
        (folder / FILE).unlink()
    assert arms(folders) == THREE_ARMS


def test_a_uniform_control_is_uniform_sampling(folders):
    for folder in folders[8:]:
        set_lisa(folder, control="uniform")
    set_lisa(folders[0], control="none")
    assert arms(folders) == THREE_ARMS


def test_runs_that_learn_are_another_arm_than_uniform_ones(folders):
    for folder in folders[:8]:
        set_path(folder, "null")
        set_lisa(folder, learn={"metric": "grad_rms"})
    for folder in folders[4:8]:
        set_lisa(folder, control="permuted")
    assert arms(folders) == THREE_ARMS
    names = la.compare([folders[i] for i in (0, 4, 8)]).arms["arm"].tolist()
    assert names == ["learning", "permuted", "uniform"]


def seeds_of_two_versions(tmp_path, method, section, *lines):
    """Two seeds of one arm, of which the second wrote lines that the first did not know."""
    found = []
    for name, more in (("1", ()), ("2", lines)):
        folder = tmp_path / name
        folder.mkdir()
        for file in (MANIFEST, EVENTS):
            shutil.copy(STUDY / "uniform-1" / file, folder)
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        edit(folder / MANIFEST, method=method, **{section: manifest.get(section, {})})
        text = (STUDY / "uniform-1" / CONFIG).read_text("utf-8").replace("seed: 1", f"seed: {name}")
        text = text.replace("lisa:\n", "\n".join(["lisa:", *(f"  {line}" for line in more), ""]))
        (folder / CONFIG).write_text(text, "utf-8")
        found.append(folder)
    return found


def test_a_default_that_an_older_version_did_not_write_makes_no_arm(tmp_path):
    folders = seeds_of_two_versions(tmp_path, "lisa", "lisa", "by: layer", "recompute: all")
    assert arms(folders) == [["1", "2"]]


def test_another_value_than_what_it_was_before_makes_one(tmp_path):
    folders = seeds_of_two_versions(tmp_path, "lisa", "lisa", "by: half")
    assert arms(folders) == [["1"], ["2"]]


def test_settings_of_a_method_that_was_not_used_make_no_arm(tmp_path):
    folders = seeds_of_two_versions(tmp_path, "lora", "lora", "by: half", "interval_steps: 77")
    for folder in folders:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        del manifest["lisa"]
        (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    assert arms(folders) == [["1", "2"]]


@pytest.mark.parametrize("folder_has_config", [True, False])
@pytest.mark.parametrize(
    ("stacks", "setting", "together"),
    [(1, "apart", True), (2, "apart", False), (2, "together", True)],
)
def test_a_run_of_before_stacks_were_drawn_apart(
    tmp_path, stacks, setting, together, folder_has_config
):
    """It drew from all as from one, which is no other thing where there is one stack alone."""
    folders = seeds_of_two_versions(tmp_path, "lisa", "lisa", f"stacks: {setting}")
    for number, folder in enumerate(folders):
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        for i, layer in enumerate(manifest["layers"]):
            layer["stack"] = "encoder" if stacks == 2 and i % 2 else "decoder"
        if number:
            manifest["lisa"]["stacks"] = setting
            if (stacks, setting) == (2, "apart"):
                manifest["lisa"]["activated_of_stack"] = {"encoder": 1, "decoder": 1}
        (folder / MANIFEST).write_text(json.dumps(manifest), "utf-8")
        if not folder_has_config:
            (folder / CONFIG).unlink()
    assert arms(folders) == ([["1", "2"]] if together else [["1"], ["2"]])
    runs = [settings(la.load(folder)) for folder in folders]
    assert differing(runs) == ([] if together else ["lisa/stacks"])


def test_a_run_of_before_towers_rested_is_another_arm(tmp_path):
    folders = seeds_of_two_versions(tmp_path, "lisa", "lisa")
    assert arms(folders) == [["1", "2"]]
    manifest = json.loads((folders[1] / MANIFEST).read_text("utf-8"))
    manifest["lisa"]["resting_towers"] = ["model.vision_tower"]
    (folders[1] / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    assert arms(folders) == [["1"], ["2"]]


# ------------------------------------------------------------------ files that settings name


def made(folder, method, *, lines, **manifest):
    """A run directory of a method with these lines of settings."""
    golden = Path(__file__).parents[2] / "data" / "golden-run"
    folder.mkdir()
    shutil.copy(golden / MANIFEST, folder / MANIFEST)
    edit(folder / MANIFEST, method=method, run_id=folder.name, **manifest)
    (folder / CONFIG).write_text(f"model_name_or_path: m\nmethod: {method}\n{lines}\n", "utf-8")
    return folder


@pytest.fixture
def selected(tmp_path):
    """Seeds that train the top layers of a profile, which each run keeps for itself."""

    def make(seed, layers, profile="{}/select_profile.json"):
        folder = tmp_path / f"select-{seed}"
        lines = f"select:\n  top: 2\n  profile: {profile.format(folder)}\nseed: {seed}"
        return made(folder, "select", lines=lines, select={"top": 2, "chosen_layers": layers})

    return make


def test_seeds_that_select_the_same_layers_are_one_arm(selected):
    """The path to its copy is each run's own."""
    folders = [selected(1, [0, 3]), selected(2, [0, 3]), selected(3, [1, 3])]
    assert arms(folders) == [["select-1", "select-2"], ["select-3"]]
    values = [settings(la.load(folder)).values["select/profile"] for folder in folders]
    assert values == ["[0, 3]", "[0, 3]", "[1, 3]"]


def test_where_a_run_does_not_say_what_it_selected_its_words_are_compared(selected):
    """As of a run directory of which only names were kept."""
    folders = [selected(seed, None, "select_profile.json") for seed in (1, 2)]
    assert arms(folders) == [["select-1", "select-2"]]


@pytest.fixture
def multiplied(tmp_path):
    """Runs under multipliers of the learning rate; `kept` is the copy in the run directory."""

    def make(seed, rates, path, *, kept=True):
        folder = tmp_path / f"lr-{seed}"
        made(folder, "full", lines=f"lr_multipliers: {path or folder / FACTORS}\nseed: {seed}")
        if kept:
            multipliers = {str(layer): rate for layer, rate in enumerate(rates)}
            content = {"schema": "lr-multipliers/1", "multipliers": multipliers, "made": seed}
            (folder / FACTORS).write_text(json.dumps(content))
        return folder

    return make


FACTORS = "lr_multipliers.json"


@pytest.mark.parametrize("path", [None, FACTORS, f"/nowhere/{FACTORS}"])
def test_multipliers_are_compared_by_content(multiplied, path):
    """Of the copy in the run, wherever the run directory has been moved."""
    folders = [multiplied(s, r, path) for s, r in ((1, [1, 2]), (2, [1, 2.0]), (3, [2, 1]))]
    assert arms(folders) == [["lr-1", "lr-2"], ["lr-3"]]
    assert differing([settings(la.load(folder)) for folder in folders]) == ["lr_multipliers"]


def test_multipliers_of_before_they_were_kept_are_those_at_the_path(multiplied, tmp_path):
    kept = multiplied(1, [1, 2], None)
    old = multiplied(2, None, kept / FACTORS, kept=False)
    gone = [multiplied(seed, None, tmp_path / "gone.json", kept=False) for seed in (3, 4)]
    assert arms([kept, old, *gone]) == [["lr-1", "lr-2"], ["lr-3", "lr-4"]]


def test_a_broken_file_is_as_good_as_gone(multiplied):
    folder = multiplied(1, [1, 2], None)
    (folder / FACTORS).write_text("{")
    assert settings(la.load(folder)).values["lr_multipliers"] == str(folder / FACTORS)


def test_a_prior_to_learn_from_is_compared_by_content(tmp_path, folders):
    copies = []
    for seed in range(4):
        folder = tmp_path / f"prior-{seed}"
        lines = f"lisa:\n  learn:\n    prior: {folder}/learn_prior.json\nseed: {seed}"
        made(folder, "lisa", lines=lines, lisa={})
        shutil.copy(folders[0] / FILE, folder / "learn_prior.json")
        copies.append(folder)
    assert arms(copies) == [[f"prior-{seed}" for seed in range(4)]]
    shutil.copy(folders[8] / FILE, copies[0] / "learn_prior.json")
    assert len(arms(copies)) == 2
