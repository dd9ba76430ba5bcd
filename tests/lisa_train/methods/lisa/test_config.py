"""LisaConfig refuses bad settings when it is made, with the numbers in the sentence."""

from pathlib import Path

import numpy as np
import pytest

from lisa_analysis.contract.errors import ConfigError
from lisa_train.config import LisaConfig


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"activated_layers": 0}, ("activated_layers is 0", "at least 1")),
        ({"activated_layers": 2.5}, ("activated_layers is 2.5", "whole number")),
        ({"activated_layers": True}, ("activated_layers is True",)),
        ({"interval_steps": 0}, ("interval_steps is 0", "at least 1")),
        ({"interval_steps": -3}, ("interval_steps is -3",)),
        ({"warmup_steps": -1}, ("warmup_steps is -1", "at least 0")),
        ({"sampling": "unifrom"}, ("'unifrom'", "Did you mean 'uniform'?")),
        ({"optimizer_state": "drop"}, ("'drop'", "reset, keep, offload")),
        ({"always_active": ("embeds",)}, ("'embeds'", "Did you mean 'embed'?")),
        ({"always_active": "embed"}, ("'embed'", "[embed]")),
        ({"probabilities": (0.5, 0.5, 0.5)}, ("sum to 1.5", "activated_layers is 2")),
        ({"probabilities": (1.5, 0.5)}, ("probabilities[0] is 1.5",)),
        ({"probabilities": (1.0, 1.1, -0.1)}, ("probabilities[1] is 1.1", "between 0")),
        ({"probabilities": (1.0, 1.0, -0.1)}, ("probabilities[2] is -0.1",)),
        ({"probabilities": (1.0, float("nan"))}, ("probabilities[1] is nan",)),
        ({"embed_probability": 0.0, "always_active": ()}, ("embed_probability is 0",)),
        ({"embed_probability": 0.5}, ("embed_probability is 0.5", "also in always_active")),
        ({"head_probability": 1.5, "always_active": ()}, ("head_probability is 1.5",)),
        ({"probabilities": ["a", "b"]}, ("probabilities[0] is 'a'", "a number from 0 to 1")),
        ({"probabilities": [0.5, None]}, ("probabilities[1] is None", "a number from 0 to 1")),
        ({"probabilities": [True, True]}, ("probabilities[0] is True",)),
        ({"probabilities": 0.5}, ("probabilities is 0.5", "path", "one number per layer")),
        ({"probabilities": 3}, ("probabilities is 3", "path", "one number per layer")),
        ({"probabilities": []}, ("sum to 0",)),
        ({"always_active": None}, ("always_active is None", "embed, head, norm", "[] for none")),
        ({"always_active": (1,)}, ("always_active is 1", "embed, head, norm")),
        ({"embed_probability": "x", "always_active": ()}, ("embed_probability is 'x'", "(0, 1]")),
        ({"head_probability": True, "always_active": ()}, ("head_probability is True",)),
        ({"seed": "x"}, ("seed is 'x'", "whole number", "None for the training seed")),
        ({"seed": 1.5}, ("seed is 1.5", "whole number")),
        ({"control_seed": 0}, ("control_seed is 0", "set lisa.control to permuted")),
        ({"layers": 3}, ("layers is 3", "'model.layers'", "None")),
        ({"activated_layers": None}, ("activated_layers is None", "whole number")),
        ({"interval_steps": "5"}, ("interval_steps is '5'", "whole number")),
    ],
)
def test_bad_settings_are_refused_at_construction(settings, words):
    with pytest.raises(ConfigError) as error:
        LisaConfig(**settings)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_lists_from_yaml_become_tuples_and_paths_text():
    config = LisaConfig(always_active=["norm"], probabilities=[0.5, 0.5, 1.0])
    assert config.always_active == ("norm",)
    assert config.probabilities == (0.5, 0.5, 1.0)
    assert LisaConfig(probabilities=Path("a") / "b.json").probabilities == str(Path("a/b.json"))
    assert hash(config) == hash(LisaConfig(always_active=("norm",), probabilities=(0.5, 0.5, 1.0)))


def test_a_layer_may_be_left_out_by_a_probability_of_zero():
    assert LisaConfig(probabilities=[1.0, 1.0, 0.0]).probabilities == (1.0, 1.0, 0.0)


def test_numbers_of_numpy_are_numbers():
    config = LisaConfig(
        np.int64(2), np.int32(5), seed=np.uint8(3), warmup_steps=np.int64(0),
        probabilities=np.array([1, 0.5, 0.5]), always_active=(), embed_probability=np.float32(0.5),
    )  # fmt: skip
    assert config == LisaConfig(
        2, 5, seed=3, probabilities=(1.0, 0.5, 0.5), always_active=(), embed_probability=0.5
    )
    for name in ("activated_layers", "interval_steps", "seed", "warmup_steps"):
        assert type(getattr(config, name)) is int
    assert type(config.embed_probability) is float
    assert {type(p) for p in config.probabilities} == {float}


def test_the_defaults_are_those_of_the_paper():
    config = LisaConfig()
    assert (config.activated_layers, config.interval_steps, config.sampling) == (2, 20, "uniform")
    assert config.always_active == ("embed", "head", "norm", "other")
    assert config.optimizer_state == "reset"
    assert config.group_probabilities == {}
