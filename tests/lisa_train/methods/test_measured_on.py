"""A file that was measured on a model of another name is used, and that is said."""

import pytest
import torch

import lisa_analysis as la
import lisa_train as lt
from lisa_train.methods.measured_on import of_another_model
from lisa_train.methods.registry import METHODS


@pytest.fixture
def files(tmp_path):
    """Of each model: a profile, and the probabilities that it gives."""

    def make(model):
        names = [f"model.layers.{layer}" for layer in range(3)]
        profile = la.ImportanceProfile.from_scores([1.0, 2.0, 4.0], names=names, model=model)
        profile.save(tmp_path / "profile.json")
        made = la.sampling_probabilities(profile, 1, use_intervals=False)
        made.save(tmp_path / "p.json")
        return str(tmp_path / "profile.json"), str(tmp_path / "p.json")

    return make


@pytest.mark.parametrize(
    ("measured", "trained", "said"),
    [
        ("org/SmolLM2", "/models/SmolLM2", False),
        ("SmolLM2", "Qwen2", True),
        ("unknown", "Qwen2", False),
        ("SmolLM2", "", False),
        ("SmolLM2", ".", False),
        ("SmolLM2", "..", False),
        ("org/SmolLM2", "/cache/models--org--SmolLM2/snapshots/607a30", False),
    ],
)
def test_names_are_compared_without_the_way_to_them(files, make_llama, measured, trained, said):
    model = make_llama(layers=3)
    model.config.name_or_path = trained
    for path in files(measured):
        found = of_another_model(path, model)
        assert found == (f"{path} was measured on SmolLM2, and this model is Qwen2" if said else "")


def test_lisa_and_select_say_it(files, make_llama):
    model = make_llama(layers=3)
    model.config.name_or_path = "Qwen2"
    profile, probabilities = files("SmolLM2")
    said = []
    config = lt.LisaConfig(activated_layers=1, probabilities=probabilities)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with lt.Lisa(model, optimizer, config, on_notice=said.append):
        assert f"{probabilities} was measured on SmolLM2, and this model is Qwen2" in said
    chosen = lt.TrainConfig(
        "M", "D", method="select", select=lt.SelectConfig(top=1, profile=profile)
    )
    wanted = f"{profile} was measured on SmolLM2, and this model is Qwen2"
    assert METHODS["select"].remarks(model, chosen) == [wanted]
