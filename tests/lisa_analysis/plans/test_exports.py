"""The registry of exports, what all of them share, the budget of whole shares, and the files."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs

import lisa_analysis as la
from lisa_analysis.contract.errors import ConfigError, LisaError, ProbabilitiesError
from lisa_analysis.contract.multipliers_file import SCHEMA, read_multipliers
from lisa_analysis.plans.budget import whole_shares
from lisa_analysis.plans.exports import EXPORTS, Content, exporter

X = np.linspace(-1, 1, 12)


@pytest.fixture
def known():
    names = [f"model.layers.{i}" for i in range(12)]
    score = np.exp(X)
    return la.ImportanceProfile.from_scores(score, names, score * 0.97, score * 1.03)


class TestRegistry:
    def test_an_export_can_be_added_from_outside(self, known, tmp_path):
        @exporter("order", "layers from the most to the least important")
        def order(plan, *, first: int = 3):
            ranked = np.argsort(-plan.evidence.score)[:first]
            return Content({"layers": ranked.tolist()}, ("Most important first.",))

        try:
            made = la.export(known, "order", first=2)
            record = json.loads(made.save(tmp_path / "o.json").read_text())
            assert record["layers"] == [11, 10]
            assert record["provenance"]["options"] == {"first": 2}
            assert made.statement == "Most important first."
            with pytest.raises(LisaError, match=r"no option 'frist'.* Did you mean 'first'"):
                la.export(known, "order", frist=2)
        finally:
            EXPORTS.pop("order")

    def test_the_name_of_a_built_in_is_taken(self):
        with pytest.raises(LisaError, match="an export 'freeze' already"):
            exporter("freeze", "mine")(lambda plan: Content({}))

    def test_an_unknown_kind_gets_a_suggestion(self, known):
        with pytest.raises(LisaError, match=r"no export 'peft_rank'.*Did you mean 'peft-rank'"):
            la.export(known, "peft_rank")

    def test_what_is_no_profile_by_layer_is_refused(self, known):
        with pytest.raises(LisaError, match="plans are made from a profile"):
            la.export([1, 2], "freeze")
        other = la.ImportanceProfile.from_scores([1.0, 2], by="kind", names=["a", "b"])
        with pytest.raises(LisaError, match="by layer, got one by kind"):
            la.export(other, "freeze")
        nameless = la.ImportanceProfile.from_scores([1.0, 2])
        with pytest.raises(LisaError, match="is no path of a model"):
            la.export(nameless, "freeze")

    def test_a_run_of_another_model_is_refused(self, known, make_run):
        with pytest.raises(LisaError, match="give the run that the profile came from"):
            la.export(known, "freeze", run=make_run(profile=5, steps=5))

    def test_loading_the_engine_of_all_needs_no_torch(self):
        import subprocess
        import sys

        code = "import sys, lisa_analysis as la; la.EXPORTS; print('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.split() == ["False"], done.stderr


class TestOfARun:
    def test_a_run_gives_modules_and_sizes(self, make_run):
        run = make_run(profile=np.exp(X), steps=200)
        made = la.export(la.importance(run), "peft-rank", run=run.path, r=4)
        assert made.values["target_modules"] == ["q_proj", "down_proj"]
        assert made.provenance["source_runs"] == [run.run_id]
        assert made.provenance["trained_parameters"] <= 4 * 12 * 2 * 200

    def test_a_profile_of_weights_without_a_head_gets_the_names_of_the_run(self, make_run):
        run = make_run(profile=np.exp(X), steps=200)
        whole = la.importance(run)
        names = [name.removeprefix("model.") for name in whole.layers["name"]]
        assert names != list(whole.layers["name"])
        bare = la.ImportanceProfile.from_scores(whole.scores, names)
        alone = la.export(bare, "freeze", layers=2, use_intervals=False)
        assert alone.values["train"]["prefixes"] == ["layers.10.", "layers.11."]
        for export in ("freeze", "peft-layers", "peft-rank"):
            options = {"layers": 2} if export != "peft-rank" else {"r": 4}
            ours, theirs = (
                la.export(profile, export, run=run, use_intervals=False, **options).values
                for profile in (
                    bare,
                    la.ImportanceProfile.from_scores(whole.scores, run.layer_names),
                )
            )
            assert ours == theirs, export

    def test_a_lora_run_names_the_modules_below_its_adapters(self, make_run):
        run = make_run(profile=np.exp(X), steps=200, method="lora")
        made = la.export(la.importance(run), "peft-layers", run=run, layers=2)
        assert made.values["layers_to_transform"] == [10, 11]
        assert made.values["target_modules"] == ["q_proj", "down_proj"]


class TestChoice:
    def test_how_many_is_said_once(self, known):
        with pytest.raises(LisaError, match="both say how many"):
            la.export(known, "freeze", layers=3, strength="pool")
        for wrong in (0, 13, 2.5, True):
            with pytest.raises(LisaError, match="layers is"):
                la.export(known, "freeze", layers=wrong)

    def test_a_pool_is_a_choice_too(self, known):
        by_layers = la.export(known, "freeze", layers=3)
        by_strength = la.export(known, "freeze", strength="pool=3")
        assert by_layers.values == by_strength.values
        assert by_layers.values["train"]["layers"] == [9, 10, 11]

    CHOOSING = ("freeze", "axolotl", "llamafactory", "peft-layers")

    def options(self, kind, **more):
        return more | ({"target_modules": "q_proj"} if kind == "peft-layers" else {})

    @pytest.mark.parametrize("kind", CHOOSING)
    def test_a_power_chooses_no_layers_and_the_file_says_so(self, known, kind):
        for how in ({"layers": 3}, {}):
            plain = la.export(known, kind, **self.options(kind, **how))
            usual = la.export(known, kind, strength=1, **self.options(kind, **how))
            made = la.export(known, kind, strength=2.0, **self.options(kind, **how))
            assert made.values == usual.values == plain.values
            assert usual.statement == plain.statement
            assert "A strength of 2 changes nothing here" in made.statement
            assert "changes nothing here" in made.provenance["statement"]

    @pytest.mark.parametrize("kind", CHOOSING)
    def test_a_strength_of_0_is_all_layers(self, known, kind):
        made = la.export(known, kind, strength=0, **self.options(kind))
        assert made.provenance["shares"] == [1] * 12
        assert made.statement.endswith("A strength of 0 is uniform: all layers.")
        with pytest.raises(LisaError, match="layers is 3 and strength 0, which is all of them"):
            la.export(known, kind, strength="0", **self.options(kind, layers=3))

    def test_llama_factory_takes_lora_where_its_options_are_given(self, make_run):
        run = make_run(profile=np.exp(X), steps=200)
        profile = la.importance(run)
        assert la.export(profile, "llamafactory", layers=2).values["finetuning_type"] == "freeze"
        for lora, rank, names in (
            ({"lora_rank": 32}, 32, ("q_proj", "down_proj")),
            ({"target_modules": "q_proj"}, 16, ("q_proj",)),
        ):
            values = la.export(profile, "llamafactory", layers=2, run=run, **lora).values
            assert (values["finetuning_type"], values["lora_rank"]) == ("lora", rank)
            targets = values["lora_target"].split(",")
            assert {t.rsplit(".", 1)[-1] for t in targets} == set(names)
            assert len(targets) == 2 * len(names)
            with pytest.raises(LisaError, match=rf"{next(iter(lora))} of LoRA cannot be had"):
                la.export(profile, "llamafactory", layers=2, method="freeze", **lora)

    def test_a_reversed_control_takes_the_worst(self, known):
        made = la.export(known, "freeze", layers=3, control="reversed")
        assert made.values["train"]["layers"] == [0, 1, 2]
        assert "reversed control" in made.statement

    def test_no_layer_above_the_mean_asks_for_a_number(self):
        names = [f"model.layers.{i}" for i in range(3)]
        profile = la.ImportanceProfile.from_scores(
            [5.0, 5.1, 0.1], names, [0.2, 0.2, 0.05], [9.0, 9, 0.15]
        )
        # Only the last one is known to stand apart, below the others.
        profile.layers["joint_low"] = [0.2, 0.2, 0.05]
        profile.layers["joint_high"] = [9.0, 9, 0.15]
        profile.layers["standing"] = ["within", "within", "below"]
        with pytest.raises(ProbabilitiesError, match=r"pool of 0 of 3 .*as 'pool=4'"):
            la.export(profile, "freeze")

    @pytest.mark.parametrize(
        ("kind", "options", "message"),
        [
            ("peft-rank", {"r": 0}, "r is 0"),
            ("peft-rank", {"target_modules": ["q"], "alpha_per_rank": 0}, "alpha_per_rank is 0"),
            ("peft-rank", {"target_modules": ["q"], "budget": 9}, "give run="),
            ("peft-rank", {"target_modules": ["q"], "budget": "1M"}, "budget is '1M'"),
            ("peft-rank", {"target_modules": ["q"], "budget": math.nan}, "budget is nan"),
            ("peft-rank", {"target_modules": ["q"], "budget": 9, "r": 2}, "give one of them"),
            ("peft-rank", {"target_modules": ["q"], "alpha_per_rank": math.inf}, "rank is inf"),
            ("peft-rank", {}, "give run= .* or target_modules"),
            ("peft-layers", {"lora_alpha": "abc"}, "lora_alpha is 'abc'"),
            ("peft-layers", {"r": 1.5}, "r is 1.5"),
            ("axolotl", {"groups": "embd"}, "Did you mean 'embed'"),
            ("axolotl", {"groups": "embed"}, "give run="),
            ("llamafactory", {"method": "full"}, "method is 'full'"),
            ("llamafactory", {"lora_rank": 0}, "lora_rank is 0"),
            ("llamafactory", {"lora_rank": "x"}, "lora_rank is 'x'"),
            ("lr", {"head": -1}, "head is -1"),
            ("lr", {"embed": math.inf}, "embed is inf"),
            ("mergekit", {"mean": 1.0}, "mean is 1.0"),
            ("mergekit", {"method": "linear"}, "method is 'linear'"),
            ("probabilities", {"activated_layers": 13}, "activated_layers is 13"),
        ],
    )
    def test_bad_options_are_one_sentence(self, known, kind, options, message):
        with pytest.raises(LisaError, match=message) as error:
            la.export(known, kind, **options)
        assert "\n" not in str(error.value)


class TestProbabilities:
    def test_the_file_is_that_of_sampling_probabilities(self, known, tmp_path):
        path = la.export(known, "probabilities", activated_layers=3, strength=2).save(
            tmp_path / "p.json"
        )
        loaded = la.SamplingProbabilities.load(path)
        made = la.sampling_probabilities(known, 3, strength=2)
        assert loaded.inclusion_probabilities == made.inclusion_probabilities
        assert loaded.statement == made.statement

    def test_k_is_that_of_the_run(self, make_run):
        names = [f"model.layers.{i}" for i in range(12)]
        drawn = make_run(profile=np.exp(X), steps=20, k=4, method="lisa")
        whole = make_run(profile=np.exp(X), steps=20, method="full")
        profile = la.ImportanceProfile.from_scores(np.exp(X), names)
        for run, k in ((drawn, 4), (drawn.path, 4), (whole, 2), (None, 2)):
            assert la.export(profile, "probabilities", run=run).values["activated_layers"] == k
        given = la.export(profile, "probabilities", run=drawn, activated_layers=3)
        assert given.values["activated_layers"] == 3
        one = la.ImportanceProfile.from_scores([1.0], names[:1])
        assert la.export(one, "probabilities").values["activated_layers"] == 1

    def test_a_seed_without_a_control_is_refused(self, known):
        with pytest.raises(LisaError, match="seed is 7, but there is no control"):
            la.export(known, "lr", seed=7)
        made = la.export(known, "probabilities", control="permuted", seed=7)
        expected = la.sampling_probabilities(known, 2, control="permuted", seed=7)
        assert made.values["inclusion_probabilities"] == expected.inclusion_probabilities


class TestMultipliersFile:
    def test_round_trip(self, known, tmp_path):
        path = la.export(known, "lr", head=2.0).save(tmp_path / "lr.json")
        read = read_multipliers(path)
        assert list(read.layers) == la.export(known, "lr").provenance["shares"]
        assert read.groups["head"] == 2.0
        assert read.layer_names[3] == "model.layers.3"

    @pytest.mark.parametrize(
        ("record", "message"),
        [
            ({"schema": "other"}, "has the schema 'other'"),
            ({"schema": SCHEMA}, "an object 'multipliers'"),
            ({"schema": SCHEMA, "multipliers": {}}, "for 0 layers"),
            ({"schema": SCHEMA, "multipliers": {"0": 1, "2": 1}}, "without a gap"),
            ({"schema": SCHEMA, "multipliers": {"0": -1}}, "the multiplier -1 for '0'"),
            ({"schema": SCHEMA, "multipliers": {"0": True}}, "the multiplier True"),
            ({"schema": SCHEMA, "multipliers": {"0": 1, "top": 1}}, "for 'top'"),
            ({"schema": SCHEMA, "multipliers": {"0": 1}, "layer_names": ["a", "b"]}, "other layer"),
            ([], "holds list"),
        ],
    )
    def test_what_is_none_is_refused_in_one_sentence(self, record, message, tmp_path):
        path = tmp_path / "lr.json"
        path.write_text(json.dumps(record))
        with pytest.raises(ConfigError, match=message) as error:
            read_multipliers(path)
        assert "\n" not in str(error.value)

    def test_missing_and_torn(self, tmp_path):
        with pytest.raises(ConfigError, match="does not exist"):
            read_multipliers(tmp_path / "no.json")
        (tmp_path / "torn.json").write_text('{"schema"')
        with pytest.raises(ConfigError, match="not complete JSON"):
            read_multipliers(tmp_path / "torn.json")
        with pytest.raises(ConfigError, match="cannot be read"):
            read_multipliers(tmp_path)


class TestWholeShares:
    numbers = hs.lists(hs.floats(0.05, 50), min_size=1, max_size=30)

    @given(numbers, hs.data())
    @settings(max_examples=200, deadline=None)
    def test_within_the_budget_near_it_and_in_order(self, weights, data):
        weights = np.array(weights)
        n = len(weights)
        costs = np.array(data.draw(hs.lists(hs.integers(1, 500), min_size=n, max_size=n)), float)
        budget = data.draw(hs.floats(float(costs.sum()), 40 * float(costs.sum())))
        most = data.draw(hs.sampled_from([5.0, 64.0, math.inf]))
        shares = whole_shares(weights, costs, budget, most=most)
        spent = float(costs @ shares)
        assert spent <= budget * (1 + 1e-9)
        assert shares.min() >= 1
        assert shares.max() <= most
        order = np.argsort(weights, kind="stable")
        assert (np.diff(shares[order]) >= 0).all()
        # Nothing is left that would pay for one more of everything.
        assert budget - spent < costs.sum() or (shares == most).any()

    def test_uniform_weights_stay_uniform(self):
        assert whole_shares(np.ones(5), np.ones(5), 18).tolist() == [3] * 5
        assert whole_shares(np.ones(5), np.array([1.0, 2, 3, 4, 5]), 8 * 15).tolist() == [8] * 5

    def test_what_rounding_left_goes_to_those_that_lost_most(self):
        assert whole_shares(np.array([1.0, 1.6, 2.4]), np.ones(3), 10).tolist() == [2, 3, 5]

    def test_by_brute_force_no_other_share_of_two_is_nearer_in_proportion(self):
        weights, costs = np.array([1.0, 3.0]), np.array([10.0, 7.0])
        shares = whole_shares(weights, costs, 200)
        exact = 200 / (weights @ costs) * weights
        assert np.abs(shares - exact).max() < 1
        assert 200 - costs @ shares < costs.max()

    def test_a_budget_below_the_least_is_refused(self):
        with pytest.raises(ProbabilitiesError, match="the budget is 4 parameters, but 1 for each"):
            whole_shares(np.ones(3), np.full(3, 2.0), 4)
        with pytest.raises(ProbabilitiesError, match="finite and above 0"):
            whole_shares(np.zeros(3), np.ones(3), 9)
