"""Profiles: definitions against the raw rows, LISA corrected for sampling, verdicts, step 0."""

import json

import numpy as np
import pandas as pd
import pytest

import lisa_analysis as la
from lisa_analysis.contract.errors import LisaError
from lisa_analysis.metrics import METRICS, find_metric
from lisa_analysis.profiles.profile import ImportanceProfile
from lisa_analysis.profiles.thresholds import Thresholds
from lisa_analysis.profiles.verdict import judge
from lisa_analysis.statistics.estimate import fit_series
from lisa_analysis.views.headlines import headline

X = np.linspace(-1, 1, 12)
ONE_RUN = [
    name
    for name, metric in METRICS.items()
    if not metric.compares and metric.rows == "steps" and "grad_noise" not in metric.needs
]


def layer_rows(run, column, layer):
    frame = run.metrics([column]).merge(run.parameters, on="param_id")
    frame = frame[(frame["layer"] == layer) & (frame["step"] > 0)]
    return frame.pivot_table(index="step", columns="param_id", values=column).to_numpy(float)


class TestDefinitions:
    """Every metric from the raw rows, by hand."""

    @pytest.fixture
    def run(self, make_run):
        return make_run(steps=50, profile=np.exp(0.3 * X), seed=3)

    def score(self, run, metric, layer=4, **options):
        return la.importance(run, metric, **options).scores[layer]

    def norm(self, run, column, layer=4):
        return np.sqrt((layer_rows(run, column, layer) ** 2).sum(axis=1))

    def test_update_norm(self, run):
        expected = np.exp(np.log(self.norm(run, "update_norm")).mean())
        assert self.score(run, "update_norm") == pytest.approx(expected, rel=1e-6)

    def test_grad_rms(self, run):
        expected = np.exp(np.log(self.norm(run, "grad_norm") / np.sqrt(20_000)).mean())
        assert self.score(run, "grad_rms") == pytest.approx(expected, rel=1e-6)

    def test_l1_descent(self, run):
        expected = np.exp(np.log(1e-3 * layer_rows(run, "grad_norm_l1", 4).sum(axis=1)).mean())
        assert self.score(run, "l1_descent") == pytest.approx(expected, rel=1e-6)

    def test_l1_descent_without_the_l1_norm(self, make_run):
        run = make_run(steps=30, edit=lambda frame: frame.drop(columns="grad_norm_l1"))
        norm = 1e-3 * self.norm(run, "grad_norm") * np.sqrt(2 * 20_000 / np.pi)
        expected = np.exp(np.log(norm).mean())
        assert self.score(run, "l1_descent") == pytest.approx(expected, rel=1e-6)

    def test_descent(self, run):
        values = np.stack([layer_rows(run, "descent", i).sum(axis=1) for i in range(12)], axis=1)
        # Over the step's common size: the mean over layers of |x| over the layer's own mean.
        size = np.abs(values)
        common = (size / size.mean(axis=0)).mean(axis=1)
        expected = (values[:, 4] / (common / common.mean())).mean()
        assert self.score(run, "descent") == pytest.approx(expected, rel=1e-6)

    def test_descent_may_be_negative(self, make_run):
        def flip(frame):
            frame.loc[frame["param_id"].isin([1, 2]), "descent"] *= -1
            return frame

        profile = la.importance(make_run(steps=60, edit=flip), "descent")
        assert profile.scores[0] < 0
        assert np.isfinite(profile.concentration.gini.value)

    def test_update_ratio(self, run):
        ratio = self.norm(run, "update_norm") / self.norm(run, "weight_norm")
        assert self.score(run, "update_ratio") == pytest.approx(np.exp(np.log(ratio).mean()))

    @pytest.mark.parametrize("metric", ["update_norm", "update_ratio", "descent"])
    def test_steps_at_the_rate_zero_say_nothing_of_a_layer(self, make_run, metric):
        """The first steps of a warm-up move nothing, the layers drawn for them alone as well."""

        def still(frame):
            frame.loc[frame["step"].between(1, 10), ["update_norm", "descent"]] *= 0
            return frame

        def warm_up(frame):
            return frame.assign(learning_rate=np.where(frame["step"] <= 10, 0.0, 1e-3))

        made = {"method": "lisa", "steps": 40, "interval": 10, "profile": 4, "seed": 2,
                "draws": [[0, 3], [1, 2], [1, 2], [1, 3]]}  # fmt: skip
        profile = la.importance(make_run(edit=still, edit_scalars=warm_up, **made), metric)
        assert np.isnan(profile.scores[0])
        assert (profile.scores[1:] > 0).all()
        assert not any("exactly 0" in word.lower() for word in profile.remarks)
        # At a rate above 0, the same zeros are what layer 0 did.
        assert la.importance(make_run(edit=still, **made), metric).scores[0] == 0

    def test_weight_norm_is_the_papers_mean(self, run):
        expected = self.norm(run, "weight_norm").mean()
        assert self.score(run, "weight_norm") == pytest.approx(expected, rel=1e-6)

    def test_delta_rel(self, run):
        start = np.sqrt(2) * 0.02 * 100
        expected = self.norm(run, "delta_norm")[-1] / start
        assert self.score(run, "delta_rel") == pytest.approx(expected, rel=1e-5)

    def test_directedness_of_a_straight_line_and_a_random_walk(self, make_run):
        straight = make_run(steps=100, noise=0, common=0, directed=1.0)
        assert self.score(straight, "directedness") == pytest.approx(10, rel=1e-4)
        walk = make_run(steps=100, noise=0, common=0, directed=0.5)
        assert self.score(walk, "directedness") == pytest.approx(1, rel=1e-4)

    def test_directedness_counts_the_steps_between_records(self, make_run):
        sparse = make_run(steps=100, every=10, noise=0, common=0, directed=1.0)
        assert self.score(sparse, "directedness") == pytest.approx(10, rel=1e-4)

    def test_grad_snr_is_higher_for_the_steadier_layer(self, make_run):
        def roughen(frame):
            rough = frame["param_id"].isin([1, 2])
            factor = np.exp(np.random.default_rng(0).standard_normal(int(rough.sum())))
            frame.loc[rough, "grad_norm"] *= factor
            return frame

        scores = la.importance(make_run(steps=200, edit=roughen), "grad_snr").scores
        assert scores[0] < scores[1:].min() / 2

    def test_grad_snr(self, run):
        norms = np.stack([self.norm(run, "grad_norm", layer) for layer in range(12)], axis=1)
        own = norms[:, 4] / np.exp(np.log(norms).mean(axis=1))
        logs, mean, deviation, weight = [], 0.0, 0.0, 0.0
        for age, value in enumerate(own, start=1):
            mean = 0.85 * mean + 0.15 * value
            weight = 0.85 * weight + 0.15
            deviation = 0.85 * deviation + 0.15 * abs(value - mean / weight)
            if age > 14:
                logs.append(np.log(mean / deviation))
        assert self.score(run, "grad_snr") == pytest.approx(np.exp(np.mean(logs)), rel=1e-5)

    def test_two_run_ratios(self, make_run):
        full = make_run(method="full", steps=30)
        lora = make_run(method="lora", steps=40)
        printed = self.score(lora, "lisa_ratio", reference=full)
        adapters = la.importance(lora, "weight_norm").scores[4]
        weights = la.importance(full, "weight_norm").scores[4]
        assert printed == pytest.approx(adapters / weights, rel=1e-6)
        repaired = self.score(lora, "lisa_delta_ratio", reference=full)
        ba = np.sqrt(np.nansum(layer_rows(lora, "delta_norm", 4)[-1] ** 2))
        dw = self.norm(full, "delta_norm")[-1]
        assert repaired == pytest.approx(ba / dw, rel=1e-5)

    def test_a_reference_of_a_metric_that_compares_nothing_is_refused(self, make_run):
        run, full = (make_run(steps=5, seed=seed) for seed in (1, 2))
        for metric in ("grad_rms", None, lambda data: data.table["grad_norm"]):
            with pytest.raises(LisaError, match=r"compares no two runs: .*lisa_ratio, lisa_delta"):
                la.importance(run, metric, reference=full)
        with pytest.raises(LisaError, match="'grad_rms' compares no two runs"):
            la.importance([run, full], reference=full.path)

    def test_ratios_need_a_reference_of_the_same_model(self, make_run):
        lora = make_run(method="lora", steps=5)
        with pytest.raises(LisaError, match="reference="):
            la.importance(lora, "lisa_ratio")
        with pytest.raises(LisaError, match="different layers"):
            la.importance(lora, "lisa_ratio", reference=make_run(steps=5, profile=3))

    def test_a_callable_is_a_metric(self, run):
        def largest_gradient(data):
            """Gradient norm, the whole layer."""
            return data.table["grad_norm"]

        profile = la.importance(run, largest_gradient)
        assert profile.metric == "largest_gradient"
        assert profile.definition == "Gradient norm, the whole layer."
        expected = np.exp(np.log(self.norm(run, "grad_norm")).mean())
        assert profile.scores[4] == pytest.approx(expected, rel=1e-6)

    def test_a_metric_of_ones_own_goes_where_a_built_in_goes(self, make_run):
        class GradRms:
            id = "own_rms"
            definition = "The built-in, written again."
            scale = "log"

            def __call__(self, data):
                return data.table["grad_norm"] / np.sqrt(data.table.numel).astype(np.float32)

        runs = [make_run(steps=60, seed=1), make_run(steps=60, seed=2)]
        own, built_in = la.compare(runs, GradRms()), la.compare(runs, "grad_rms")
        assert own.metric == "own_rms"
        assert own.profiles.equals(built_in.profiles)
        page = la.report(runs[0], metric=GradRms()).html
        assert "The built-in, written again." in page
        assert "own_rms by kind of module" in page

    def test_every_definition_is_one_sentence(self, make_run):
        for name, metric in METRICS.items():
            assert metric.definition.endswith("."), name
            assert ". " not in metric.definition, name


class TestBadInput:
    def test_unknown_metric(self, make_run):
        with pytest.raises(LisaError, match="Did you mean 'update_norm'"):
            la.importance(make_run(steps=2), "update_nrm")

    def test_column_that_was_not_recorded(self, make_run):
        run = make_run(steps=5, edit=lambda frame: frame.drop(columns="descent"))
        with pytest.raises(LisaError, match="descent was not recorded"):
            la.importance(run, "descent")

    def test_confidence(self, make_run):
        with pytest.raises(LisaError, match="confidence is 95"):
            la.importance(make_run(steps=2), confidence=95)

    def test_a_metric_of_the_wrong_shape(self, make_run):
        with pytest.raises(LisaError, match="returned an array of shape"):
            la.importance(make_run(steps=2), lambda data: data.table["grad_norm"][0])

    def test_metrics_by_id(self):
        assert find_metric("descent").id == "descent"


class TestLisa:
    """Corrected for sampling."""

    @pytest.mark.parametrize(
        "metric",
        ["update_norm", "grad_rms", "l1_descent", "update_ratio", "descent", "weight_norm"],
    )
    def test_identical_layers_come_out_equal_however_often_drawn(self, make_run, metric):
        rng = np.random.default_rng(0)
        weights = np.array([8, 4, 2, 1, 1, 1]) / 17
        draws = [sorted(rng.choice(6, 2, replace=False, p=weights).tolist()) for _ in range(60)]
        run = make_run(method="lisa", steps=600, draws=draws, profile=6, noise=0, trend=-2.0)
        frame = la.importance(run, metric).to_frame()
        assert frame["visits"].max() > 3 * frame["visits"].min()
        assert np.ptp(np.log(frame["score"])) < 1e-3

    @pytest.mark.parametrize("k", [1, 2])
    def test_equally_steady_layers_come_out_equal_however_often_drawn(self, make_run, k):
        """Norms fall between two activations: that is no unsteadiness of the layer drawn rarely."""
        weights = np.array([6, 1, 1, 1, 1, 1, 1, 1]) / 13
        ratios = []
        for seed in range(6):
            rng = np.random.default_rng(seed)
            draws = [sorted(rng.choice(8, k, replace=False, p=weights)) for _ in range(60)]
            run = make_run(
                method="lisa", steps=600, draws=[[int(i) for i in drawn] for drawn in draws], k=k,
                trend=-2.0, seed=seed,
            )  # fmt: skip
            scores = la.importance(run, "grad_snr").scores
            ratios.append(np.log(scores[0] / np.nanmedian(scores[1:])))
        assert abs(np.mean(ratios)) < 0.1

    @pytest.mark.parametrize("directed", [0.5, 1.0])
    def test_visits_are_divided_out_of_the_total_change(self, make_run, directed):
        rng = np.random.default_rng(1)
        weights = np.array([8, 4, 2, 1, 1, 1]) / 17
        draws = [sorted(rng.choice(6, 2, replace=False, p=weights).tolist()) for _ in range(60)]
        run = make_run(method="lisa", steps=600, draws=draws, profile=6, noise=0, common=0,
                       directed=directed)  # fmt: skip
        profile = la.importance(run, "delta_rel")
        raw = [np.sqrt((layer_rows(run, "delta_norm", i)[-1] ** 2).sum()) for i in range(6)]
        assert max(raw) > 1.7 * min(raw)
        assert np.ptp(np.log(profile.scores)) < 0.02

    @pytest.mark.parametrize(("power", "spread"), [(1.0, 1e-5), (0.5, 1e-5)])
    def test_layers_drawn_late_in_a_decaying_schedule_are_not_called_lazy(
        self, make_run, power, spread
    ):
        """ΔW grows with the learning rates spent, directed (their sum) or random (of squares)."""
        rng = np.random.default_rng(1)
        halves = np.repeat([0, 3], 30)  # layers 0 to 2 are drawn early, 3 to 5 late
        draws = [sorted((half + rng.choice(3, 2, replace=False)).tolist()) for half in halves]
        rate = 1e-3 * np.cos(np.pi / 2 * np.arange(600) / 610)
        active = np.zeros((600, 6))
        for step in range(600):
            active[step, draws[step // 10]] = 1
        moved = np.cumsum(active * rate[:, None] ** (1 / power), axis=0) ** power

        def follow_the_rate(frame):
            layer = (frame["param_id"].to_numpy() - 1) // 2  # q and down of each layer
            inside = (layer >= 0) & (layer < 6)
            rows = frame["step"].to_numpy()[inside] - 1
            frame.loc[inside, "delta_norm"] = moved[rows, layer[inside]]
            return frame

        run = make_run(
            method="lisa", steps=600, draws=draws, profile=6, noise=0, common=0,
            edit=follow_the_rate, edit_scalars=lambda frame: frame.assign(learning_rate=rate),
        )  # fmt: skip
        by_visits = moved[-1] / np.bincount(np.ravel(draws)) ** power
        assert np.ptp(np.log(by_visits)) > 0.3
        assert np.ptp(np.log(la.importance(run, "delta_rel").scores)) < spread

    @pytest.mark.parametrize("directed", [0.5, 1.0])
    def test_directedness_is_matched_in_the_number_of_steps(self, make_run, directed):
        draws = [[0, 1], [0, 2], [0, 3], [0, 1], [0, 2], [0, 3]]
        run = make_run(method="lisa", steps=60, draws=draws, profile=4, noise=0, common=0,
                       directed=directed)  # fmt: skip
        scores = la.importance(run, "directedness").scores
        # Layer 0 trained for 60 steps, the others for 20.
        np.testing.assert_allclose(scores, 1 if directed == 0.5 else np.sqrt(20), rtol=1e-4)

    def test_a_layer_is_judged_on_its_active_steps(self, make_run):
        truth = np.exp(0.5 * X**2)
        run = make_run(method="lisa", steps=1500, k=3, interval=10, profile=truth, trend=-1.0)
        scores = la.importance(run, "update_norm").scores
        relative = np.log(scores / truth)
        assert np.ptp(relative) < 0.15

    def test_unseen_is_unknown(self, make_run):
        run = make_run(method="lisa", steps=20, interval=10, profile=5, draws=[[0, 1], [1, 2]])
        profile = la.importance(run)
        frame = profile.to_frame()
        assert profile.unseen == (3, 4)
        assert frame["score"].isna().tolist() == [False, False, False, True, True]
        assert frame["visits"].tolist() == [1, 2, 1, 0, 0]
        assert "Never observed training" in profile.statement
        assert profile.verdict == "undecided"

    def test_one_layer_at_a_time(self, make_run):
        run = make_run(method="lisa", steps=600, k=1, interval=5, profile=6, noise=0, common=0,
                       trend=-1.0)  # fmt: skip
        assert np.ptp(np.log(la.importance(run).scores)) < 0.02


class TestVerdicts:
    @pytest.mark.parametrize(
        ("truth", "verdict"),
        [
            (0.4 * X**2, "U"),
            (-0.4 * X**2, "inverted U"),
            (0.4 * X, "ramp"),
            (0 * X, "flat"),
        ],
    )
    @pytest.mark.parametrize("method", ["full", "lora", "lisa"])
    def test_planted_effects_are_found(self, make_run, truth, verdict, method):
        """400 steps for every layer, or 1600 LISA steps with 3 of 12 layers active."""
        steps = 1600 if method == "lisa" else 400
        run = make_run(profile=np.exp(truth), steps=steps, rho=0.5, k=3, method=method)
        assert la.importance(run, "grad_rms").verdict == verdict

    @pytest.mark.parametrize("seed", range(3))
    def test_one_high_layer_at_the_end_is_no_ramp(self, make_run, seed):
        run = make_run(profile=[1.0] * 11 + [3.0], steps=400, rho=0.5, seed=seed)
        profile = la.importance(run)
        assert (profile.verdict, profile.shape.spikes) == ("spikes", (11,))
        assert profile.above == (11,)
        assert "Layer 11 stands above the others" in profile.statement

    def test_a_pilot_too_short_for_its_course_still_shows_scores(self, make_run):
        run = make_run(profile=np.exp(0.4 * X**2), steps=60, rho=0.98)
        profile = la.importance(run)
        assert profile.verdict in ("undecided", "drifting")
        assert "insufficient for intervals (courses slower than a fifth of the run" in (
            profile.statement
        )
        assert profile.to_frame()["low"].isna().all()
        assert profile.unknown == tuple(range(12))
        assert np.isfinite(profile.scores).all()
        assert not profile.concentration.headroom.sufficient

    @pytest.mark.parametrize("steps", [1, 2, 3, 5])
    @pytest.mark.parametrize("method", ["full", "lora", "lisa"])
    @pytest.mark.parametrize("metric", ONE_RUN)
    def test_the_shortest_runs_do_not_crash(self, make_run, steps, method, metric):
        profile = la.importance(make_run(steps=steps, method=method), metric)
        assert profile.verdict in ("undecided", "flat")
        assert len(profile.to_frame()) == 8
        json.dumps(profile.to_dict(), allow_nan=False)

    def test_a_run_without_steps_is_unknown(self, make_run):
        run = make_run(steps=3, edit=lambda frame: frame.iloc[:0].assign(grad_norm=[]))
        profile = la.importance(run, lambda data: np.ones(data.table.trained.shape))
        assert profile.unseen == tuple(range(8))
        assert "nothing is known" in profile.statement

    def test_encoder_and_decoder_have_no_common_shape(self, make_run):
        layers = [
            {"index": i, "name": f"{side}.block.{i % 4}", "stack": f"{side}.block"}
            for i, side in enumerate(["encoder"] * 4 + ["decoder"] * 4)
        ]
        run = make_run(steps=200, profile=np.geomspace(1, 3, 8), manifest={"layers": layers})
        profile = la.importance(run)
        assert profile.verdict == "apart"
        assert "2 stacks have no common depth" in profile.statement
        # Four layers are too few to test a course of, and clearly unequal.
        assert [s.shape.verdict for s in profile.stacks] == ["uneven", "uneven"]
        assert profile.concentration.headroom.low > 1.1

    def test_each_of_several_stacks_has_its_own_shape(self, make_run, tmp_path):
        depth = np.linspace(-1, 1, 12)
        layers = [
            {"index": i, "name": f"model.{side}.layers.{i % 12}", "stack": f"model.{side}.layers"}
            for i, side in enumerate(["encoder"] * 12 + ["decoder"] * 12)
        ]
        truth = np.concatenate([0.5 + depth**2, 1.2 + 0.5 * depth])
        runs = [
            make_run(steps=300, profile=truth, seed=seed, manifest={"layers": layers})
            for seed in (1, 2, 3)
        ]
        profile = la.importance(runs[0])
        encoder, decoder = profile.stacks
        assert (encoder.path, encoder.first, encoder.last) == ("model.encoder.layers", 0, 11)
        assert (decoder.path, decoder.first, decoder.last) == ("model.decoder.layers", 12, 23)
        assert (encoder.shape.verdict, decoder.shape.verdict) == ("U", "ramp")
        assert decoder.shape.slope.low > 0
        assert profile.shape.verdict not in ("U", "ramp")
        for words in ("In model.encoder.layers (layers 0 to 11): the profile is a U",
                      "In model.decoder.layers (layers 12 to 23): the profile is a ramp that ri",
                      "Over all of them the spread"):  # fmt: skip
            assert words in profile.statement
        said = headline(profile)
        assert said.endswith(". Shape: encoder U, decoder ramp")
        assert said.startswith("Layer")
        assert ImportanceProfile.load(profile.save(tmp_path / "p.json")) == profile
        together = la.importance(runs)
        assert [s.shape.verdict for s in together.stacks] == ["U", "ramp"]
        given = ImportanceProfile.from_scores(
            truth, [x["name"] for x in layers], truth * 0.98, truth * 1.02
        )
        assert [s.path for s in given.stacks] == ["model.encoder.layers", "model.decoder.layers"]
        assert la.importance(runs[0], by="module").stacks == ()

    def test_two_stacks_without_a_course_are_named_as_rarely_as_one(self):
        """The two tests share the error of one: autocorrelated noise, equal layers."""
        stacks = ("e",) * 8 + ("d",) * 8
        named = 0
        for seed in range(60):
            rng = np.random.default_rng(seed)
            noise = np.zeros((200, 16))
            for t in range(1, 200):
                noise[t] = 0.6 * noise[t - 1] + rng.normal(size=16)
            fit = fit_series(np.exp(0.3 * noise), log=True, clusters=None, confidence=0.95,
                             rng=rng, stacks=stacks)  # fmt: skip
            steps = np.arange(200)
            found = judge(fit, 0.95, Thresholds(), steps=steps, period=None, rng=rng,
                          stacks=stacks)  # fmt: skip
            named += any(s.shape.verdict not in ("flat", "undecided", "apart", "drifting")
                         for s in found.stacks)  # fmt: skip
        assert named <= 3

    def test_one_layer_model(self, make_run):
        profile = la.importance(make_run(steps=100, profile=1))
        assert profile.n_layers == 1

    def test_drift_is_flagged_and_located(self, make_run):
        def swap(frame):
            late = (frame["step"] > 300) & frame["param_id"].isin([1, 2])
            frame.loc[late, ["grad_norm", "update_norm"]] *= 2.0
            return frame

        drifting = la.importance(make_run(steps=600, edit=swap)).reliability
        assert drifting.drift
        assert 290 < drifting.drift_step < 360
        steady = la.importance(make_run(steps=600)).reliability
        assert steady.drift is False
        assert steady.drift_step is None

    def test_reliability_of_a_strong_and_of_no_profile(self, make_run):
        strong = la.importance(make_run(profile=np.exp(X), steps=400)).reliability
        assert strong.split_half > 0.99
        assert strong.steps_needed == 0
        assert strong.enough
        nothing = la.importance(make_run(profile=12, steps=400)).reliability
        assert nothing.split_half < 0.8
        assert nothing.steps_needed > 400
        assert not nothing.enough

    def test_steps_still_needed_are_about_enough(self, make_run):
        """After as many steps as were asked for, the split-half reliability is near 0.9."""
        truth = np.exp(0.03 * np.random.default_rng(5).standard_normal(24))
        first = la.importance(make_run(profile=truth, steps=150, noise=0.3, seed=1)).reliability
        assert first.split_half < 0.9
        needed = first.steps_needed
        assert 100 < needed < 3000
        later = make_run(profile=truth, steps=150 + int(needed), noise=0.3, seed=2)
        assert la.importance(later).reliability.split_half > 0.8


class TestInitialisation:
    """How much of a profile was there at step 0."""

    def test_raw_adapter_norms_are_called_initialisation(self, make_run):
        profile = la.importance(make_run(method="lora", steps=80, rank=16), "weight_norm")
        start = profile.initialisation
        assert start.explained
        assert start.share > 0.99
        assert start.level > 0.95
        assert "explained by adapter initialisation" in profile.statement
        # √(r/3) for each of two adapted linear maps, √(hidden·r) for the embedding (PEFT).
        np.testing.assert_allclose(start.expected, np.sqrt(2 * 16 / 3))
        outside = profile.outside.set_index("name")
        assert outside.loc["embed", "initial"] == pytest.approx(np.sqrt(100 * 16), rel=0.05)
        np.testing.assert_allclose(profile.to_frame()["initial"], start.expected, rtol=0.05)
        assert not la.sampling_probabilities(profile).justified

    def test_learned_adapter_norms_are_not(self, make_run):
        def learn(frame):
            growth = 1 + 4 * (frame["param_id"] % 7) * frame["step"] / 80
            frame["weight_norm"] *= growth
            return frame

        run = make_run(method="lora", steps=80, edit=learn)
        start = la.importance(run, "weight_norm").initialisation
        assert not start.explained
        assert start.level < 0.9

    def test_an_untouched_embedding_does_not_hide_what_the_layers_learned(self, make_run):
        """The embedding's norm is ten times a layer's: it alone makes R² of all groups 0.98."""

        def learn_a_u(frame):
            layer = (frame["param_id"].to_numpy() - 3) // 6  # q and down: base, A, B each
            depth = np.linspace(-1, 1, 8)[np.clip(layer, 0, 7)]
            inside = (layer >= 0) & (layer < 8)
            grown = np.exp(0.25 * depth**2 * np.minimum(frame["step"] / 20, 1))
            frame["weight_norm"] *= np.where(inside, grown, 1.0)
            return frame

        run = make_run(method="lora", steps=300, edit=learn_a_u)
        start = la.importance(run, "weight_norm").initialisation
        assert start.share > 0.95
        assert start.level > 0.9
        assert not start.explained
        assert "among the layers alone" in start.statement
        assert "The layers' raw adapter norms have moved away" in start.statement

    def test_adapter_change_has_no_initial_profile(self, make_run):
        assert la.importance(make_run(method="lora"), "delta_rel").initialisation is None

    def test_full_fine_tuning_norms_are_pretrained(self, make_run):
        profile = la.importance(make_run(), "weight_norm")
        assert not profile.initialisation.explained
        assert "pretrained weights" in profile.statement

    def test_first_gradients_are_those_of_the_untrained_weights(self, make_run):
        strong = la.importance(make_run(profile=np.exp(X), steps=100), "grad_rms")
        assert strong.initialisation.share > 0.8
        noise = la.importance(make_run(profile=12, steps=100), "grad_rms")
        assert noise.initialisation is None

    def test_the_layers_drawn_first_are_no_profile_of_the_start(self, make_run):
        run = make_run(method="lisa", profile=np.exp(X), steps=400)
        assert la.importance(run, "grad_rms").initialisation is None

    def test_without_a_census_nothing_is_claimed(self, make_run):
        run = make_run(method="lora", census=False)
        assert la.importance(run, "weight_norm").initialisation is None


class TestZero:
    """Exactly zero is a state of its own: no number is invented for it."""

    @staticmethod
    def without_gradient(*layers, steps=None):
        def cut(frame):
            rows = frame["param_id"].isin([1 + 2 * i + part for i in layers for part in (0, 1)])
            if steps is not None:
                rows &= frame["step"].isin(steps)
            frame.loc[rows, ["grad_norm", "grad_norm_l1", "update_norm", "descent"]] = 0.0
            return frame

        return cut

    @pytest.mark.parametrize("metric", ["grad_rms", "l1_descent", "update_norm", "descent"])
    def test_a_layer_of_zeros_has_the_score_zero_and_no_interval(self, make_run, metric):
        """0.310 [0.308, 0.313] before, the smallest number of any layer, as if it were measured."""
        run = make_run(profile=np.exp(0.4 * X), steps=300, edit=self.without_gradient(7))
        profile = la.importance(run, metric)
        row = profile.to_frame().iloc[7]
        assert row["score"] == 0
        assert np.isnan(row["low"])
        assert np.isnan(row["high"])
        assert row["zeros"] == 300
        assert profile.zero == (7,)
        assert profile.unseen == ()
        assert "layer 7" in profile.statement.lower()
        assert f"its {metric} is exactly 0 throughout" in profile.statement

    def test_the_other_layers_are_judged_as_if_it_were_not_there(self, make_run):
        # Fewer layers would allow for courses, and eleven for a little more than twelve.
        truth = np.exp(0.4 * np.linspace(-1, 1, 18) ** 2)
        dead = la.importance(make_run(profile=truth, steps=300, edit=self.without_gradient(7)))
        alive = la.importance(make_run(profile=truth, steps=300))
        assert "No gradient reaches layer 7: its grad_rms is exactly 0 throughout." in (
            dead.statement
        )
        assert dead.verdict == "U"
        assert dead.sufficient
        others = np.arange(18) != 7
        np.testing.assert_allclose(dead.scores[others], alive.scores[others], rtol=1e-5)
        low = dead.layers["low"][others]
        np.testing.assert_allclose(low, alive.layers["low"][others], rtol=0.02)
        assert (dead.samples[:, 7] == 0).all()

    def test_an_underflow_elsewhere_changes_nothing(self, make_run):
        def underflow(frame):
            frame = self.without_gradient(7)(frame)
            frame.loc[(frame["step"] == 5) & frame["param_id"].isin([1, 2]), "grad_norm"] = 1e-30
            return frame

        assert la.importance(make_run(profile=12, steps=300, edit=underflow)).scores[7] == 0

    def test_single_zeros_are_left_out_and_named(self, make_run):
        some = range(10, 300, 10)
        run = make_run(profile=12, steps=300, edit=self.without_gradient(3, steps=some))
        profile = la.importance(run)
        row = profile.to_frame().iloc[3]
        assert (row["zeros"], row["steps"]) == (29, 271)
        assert profile.zero == ()
        assert "left out: layer 3 (at most 29 steps)" in profile.statement
        norms = np.sqrt((layer_rows(run, "grad_norm", 3) ** 2).sum(axis=1)) / np.sqrt(20_000)
        kept = [step for step in range(1, 301) if step not in some]
        expected = np.exp(np.log(norms[np.array(kept) - 1]).mean())
        assert row["score"] == pytest.approx(expected, rel=0.01)

    def test_a_layer_drawn_alone_is_not_called_unseen(self, make_run):
        """K = 1: every row of the layer holds nothing but zero."""
        run = make_run(
            method="lisa", steps=200, k=1, interval=5, profile=4, edit=self.without_gradient(2)
        )
        profile = la.importance(run)
        assert profile.zero == (2,)
        assert "No gradient reaches layer 2" in profile.statement
        assert "Never observed" not in profile.statement

    def test_what_no_step_gives_a_value_is_not_called_untrained(self, make_run):
        run = make_run(profile=12, steps=100, edit=self.without_gradient(7))
        text = la.importance(run, "grad_snr").statement
        assert "Trained, and still without a value: 1 of 12 layers are unknown." in text
        assert "Never observed" not in text
        short = la.importance(make_run(steps=5), "grad_snr").statement
        assert short == "No recorded step gave a value: nothing is known about grad_snr."

    def test_no_gradient_anywhere(self, make_run):
        run = make_run(steps=30, profile=4, edit=self.without_gradient(0, 1, 2, 3))
        profile = la.importance(run)
        assert profile.zero == (0, 1, 2, 3)
        assert "No gradient reaches layers 0, 1, 2, 3" in profile.statement
        assert profile.verdict == "undecided"
        json.dumps(profile.to_dict(), allow_nan=False)

    def test_it_goes_through_every_view(self, make_run):
        from lisa_analysis.views import terminal

        run = make_run(profile=8, steps=100, edit=self.without_gradient(2))
        other = make_run(profile=8, steps=100)
        assert "No gradient reaches layer 2" in la.report(run).html
        profile = la.importance(run)
        made = la.sampling_probabilities(profile)
        assert "No gradient reaches layer 2" in " ".join(
            terminal.layer_table(profile, made).split()
        )
        assert la.compare([run, other]).rank_agreement["layers"][0] == 8

    def test_values_below_zero_have_no_logarithm(self, make_run):
        with pytest.raises(LisaError, match="give it the scale 'linear'"):
            la.importance(make_run(steps=5), lambda data: -data.table["grad_norm"])


class TestProfileObject:
    @pytest.fixture
    def profile(self, make_run):
        return la.importance(make_run(profile=np.exp(X), steps=200))

    def test_frame_has_the_agreed_columns(self, profile):
        frame = profile.to_frame()
        assert list(frame)[:10] == [
            "layer", "name", "score", "low", "high", "joint_low", "joint_high", "n_eff", "visits",
            "initial",
        ]  # fmt: skip
        assert (frame["joint_low"] < frame["low"]).all()
        assert (frame["high"] < frame["joint_high"]).all()
        assert frame["layer"].tolist() == list(range(12))
        assert (frame["low"] < frame["score"]).all()
        assert (frame["score"] < frame["high"]).all()
        frame["score"] = 0
        assert (profile.to_frame()["score"] > 0).all()

    def test_embedding_and_norm_are_apart(self, profile):
        assert profile.outside["name"].tolist() == ["embed", "norm"]
        assert profile.outside["layer"].isna().all()
        assert "embed" not in set(profile.to_frame()["name"])

    def test_save_and_read_back(self, profile, tmp_path):
        saved = json.loads(profile.save(tmp_path / "p.json").read_text())
        assert saved["verdict"] == "ramp"
        assert len(saved["layers"]) == 12
        table = pd.read_csv(profile.save(tmp_path / "p.csv"))
        assert len(table) == 14
        with pytest.raises(LisaError, match=r"use \.json, \.csv, \.parquet, \.png or \.svg"):
            profile.save(tmp_path / "p.txt")
        with pytest.raises(LisaError, match=r"numbers alone.*\.json or \.parquet"):
            la.ImportanceProfile.load(tmp_path / "p.csv")

    def test_parquet_holds_the_rows_for_all_and_the_profile_for_load(self, profile, tmp_path):
        path = profile.save(tmp_path / "p.parquet")
        rows = pd.read_parquet(path)
        pd.testing.assert_frame_equal(rows.head(12), profile.layers)
        assert rows["name"].tolist()[12:] == ["embed", "norm"]
        assert la.ImportanceProfile.load(path) == profile
        rows.to_parquet(tmp_path / "other.parquet")
        with pytest.raises(LisaError, match="holds no profile"):
            la.ImportanceProfile.load(tmp_path / "other.parquet")
        (tmp_path / "torn.parquet").write_bytes(path.read_bytes()[:100])
        with pytest.raises(LisaError, match="not a complete Parquet file"):
            la.ImportanceProfile.load(tmp_path / "torn.parquet")
        with pytest.raises(LisaError, match="cannot be read"):
            la.ImportanceProfile.load(tmp_path / "none.parquet")

    def test_it_is_saved_as_the_picture_that_plot_draws(self, profile, tmp_path):
        axes = profile.plot()
        heights = [bar.get_height() for bar in axes.patches[:12]]
        assert heights == pytest.approx(profile.scores.tolist())
        assert axes.get_ylabel() == profile.metric
        picture = profile.save(tmp_path / "p.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        drawing = profile.save(tmp_path / "p.svg").read_bytes()
        for layer in range(12):
            assert f'id="layer-{layer}"'.encode() in drawing
        assert profile.save(tmp_path / "again.svg").read_bytes() == drawing
        with pytest.raises(LisaError, match="holds a picture"):
            la.ImportanceProfile.load(tmp_path / "p.svg")

    def test_a_saved_profile_is_read_back(self, make_run, profile, tmp_path):
        short = la.importance(make_run(method="lora", steps=5), "weight_norm", by="module")
        for number, made in enumerate((profile, short)):
            read = la.ImportanceProfile.load(made.save(tmp_path / f"{number}.json"))
            assert read == made
            assert hash(read) == hash(made)
            pd.testing.assert_frame_equal(read.to_frame(), made.to_frame(), check_dtype=False)
            assert read.sufficient == made.sufficient
        again = la.sampling_probabilities(la.ImportanceProfile.load(tmp_path / "0.json"))
        first = la.sampling_probabilities(profile)
        assert again.inclusion_probabilities == first.inclusion_probabilities
        assert again.statement == first.statement
        strict = la.importance(make_run(steps=30), thresholds=Thresholds(headroom=2.0))
        read = la.ImportanceProfile.load(strict.save(tmp_path / "strict.json"))
        assert read.thresholds == strict.thresholds
        for text in ("[]", "{", '{"metric": "x"}', "null"):
            (tmp_path / "bad.json").write_text(text)
            with pytest.raises(LisaError, match=r"bad\.json"):
                la.ImportanceProfile.load(tmp_path / "bad.json")
        with pytest.raises(LisaError, match="cannot be read"):
            la.ImportanceProfile.load(tmp_path / "none.json")

    def test_it_is_a_sequence_of_rows(self, profile):
        assert len(profile) == 12
        row = profile[3]
        assert row.score == profile.scores[3]
        assert (row.layer, row.name, row.steps) == (3, "model.layers.3", 200)
        assert row.low < row.score < row.high
        assert profile[-1].layer == 11
        assert [r.layer for r in profile[3:6]] == [3, 4, 5]
        assert [r.score for r in profile] == profile.scores.tolist()
        assert profile[np.int64(2)].layer == 2
        with pytest.raises(IndexError, match="no layer 12: the profile has 12"):
            profile[12]
        assert profile["model.layers.3"] == row
        assert profile["embed"].score == profile.outside["score"][0]
        with pytest.raises(
            LisaError, match=r"no row 'model.layer.3'.*Did you mean 'model.layers.3'"
        ):
            profile["model.layer.3"]
        with pytest.raises(LisaError, match="whole numbers, names and slices"):
            profile[1.5]
        twins = la.ImportanceProfile.from_scores([1.0, 2.0], by="kind")
        twins.layers["name"] = "same"
        with pytest.raises(LisaError, match="2 rows of the profile are called 'same'"):
            twins["same"]

    def test_profiles_are_equal_when_they_say_the_same(self, make_run, profile):
        run = make_run(steps=60)
        a, b = la.importance(run), la.importance(run)
        assert a == b
        assert len({a, b}) == 1
        assert a != profile
        assert a != "a profile"

    def test_the_frame_says_what_it_holds(self, make_run):
        run = make_run(method="lisa", steps=20, interval=10, profile=5, draws=[[0, 1], [1, 2]])
        attrs = la.importance(run).to_frame().attrs
        assert attrs["definition"].startswith("Geometric mean over steps of")
        assert attrs["coverage"] == "3 of 5 layers observed"
        assert attrs["sources"] == [run.run_id]

    def test_paths_are_opened_and_other_things_refused_in_words(self, make_run):
        run = make_run(steps=20)
        assert la.importance(str(run.path)) == la.importance(run)
        assert la.importance(run.path) == la.importance(run)
        with pytest.raises(LisaError, match="have the same seed"):
            la.importance([run, run])
        for wrong in (None, 3, {"a": run}):
            with pytest.raises(LisaError, match="importance takes a run directory"):
                la.importance(wrong)
        for wrong in (["grad_rms"], 3, dict):
            with pytest.raises(LisaError, match="takes one metric"):
                la.importance(run, wrong)

    def test_the_same_run_gives_the_same_profile(self, make_run):
        run = make_run(steps=60)
        assert la.importance(run).to_dict() == la.importance(run).to_dict()

    def test_repr_is_short_and_html_is_escaped(self, make_run):
        profile = la.importance(make_run(steps=20, run_id="<script>alert(1)</script>"))
        assert len(repr(profile)) < 200
        assert "<script>" not in profile._repr_html_()

    @pytest.mark.parametrize("by", ["kind", "module", "tensor"])
    def test_other_levels(self, make_run, by):
        profile = la.importance(make_run(steps=40), by=by)
        assert profile.n_layers == {"kind": 2, "module": 16, "tensor": 16}[by]
        assert profile.verdict == "undecided"
        assert "by layer only" in profile.statement

    def test_a_running_run_is_analysed_so_far(self, make_run):
        run = make_run(steps=30, manifest={"status": "running"})
        assert np.isfinite(la.importance(run).scores).all()

    def test_zeros_of_a_warm_up_are_left_out(self, make_run):
        def warm_up(frame):
            frame.loc[frame["step"] == 1, "update_norm"] = 0.0
            return frame

        plain, warm = make_run(steps=40), make_run(steps=40, edit=warm_up)
        frame = la.importance(warm, "update_norm").to_frame()
        assert (frame["steps"] == 39).all()
        expected = la.importance(plain, "update_norm").scores
        np.testing.assert_allclose(frame["score"], expected, rtol=0.1)


class TestProbes:
    """Measuring passes see frozen layers too."""

    @staticmethod
    def with_probes(frame, every=5):
        """Add a pass every few steps: layer i has the gradient i + 1, trained or not."""
        steps = range(0, 1 + int(frame["step"].max()), every)
        rows = pd.DataFrame(
            [
                (step, 1 + 2 * layer + part, (layer + 1) / np.sqrt(2))
                for step in steps
                for layer in range(4)
                for part in range(2)
            ],
            columns=["step", "param_id", "probe_grad_norm"],
        )
        frame = frame.drop(columns="probe_grad_norm")
        return frame.merge(rows, how="outer", on=["step", "param_id"])

    @pytest.fixture
    def run(self, make_run, monkeypatch):
        import pyarrow as pa

        run = make_run(method="lisa", steps=20, profile=4, draws=[[0, 1], [1, 2]])
        frame = self.with_probes(run.metrics())
        columns = [pa.array(frame[name], from_pandas=True) for name in frame]
        batch = pa.RecordBatch.from_arrays(columns, names=list(frame))
        monkeypatch.setattr(run, "iter_metrics", lambda columns: [batch])
        return run

    def test_layers_that_never_trained_are_measured(self, run):
        profile = la.importance(run, "probe_rms")
        expected = np.arange(1, 5) / np.sqrt(20_000)
        np.testing.assert_allclose(profile.scores, expected, rtol=1e-6)
        np.testing.assert_allclose(profile.to_frame()["initial"], expected, rtol=1e-6)
        assert (profile.to_frame()["steps"] == 5).all()

    def test_probes_are_no_training(self, run):
        assert la.importance(run, "grad_rms").unseen == (3,)
        assert la.diagnose(run)["schedule_mismatch"].state == "ok"
        assert la.diagnose(run)["norm_mismatch"].state == "ok"

    def test_without_probes(self, make_run):
        with pytest.raises(LisaError, match="probe_grad_norm was not recorded"):
            la.importance(make_run(steps=5), "probe_rms")


def test_total_change_measured_by_the_census_alone(make_run):
    """Full fine-tuning measures ‖W − W_0‖ in the census rows only, frozen tensors included."""

    def census_only(frame):
        last = frame["step"] == frame["step"].max()
        return frame.assign(delta_norm=frame["delta_norm"].where(last))

    steady, sparse = make_run(steps=40), make_run(steps=40, edit=census_only)
    for metric in ("delta_rel", "directedness"):
        expected = la.importance(steady, metric).scores
        np.testing.assert_allclose(la.importance(sparse, metric).scores, expected)
