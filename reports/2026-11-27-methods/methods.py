"""What is compared: methods, in words of `lisa-train`. DESIGN.md says why."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from environments import Environment, environments

import lisa_analysis as la

RANK = 16
HEADS = "--select.groups=[head]"
STEPS = {"pos": 100, "fashion": 120, "define": 40, "voice": 24}
BATCHES = {"pos": 32, "fashion": 32, "define": 8, "voice": 16}
EVALUATED = {"pos": 2048, "fashion": 2000, "define": 256, "voice": 200}
PERIODS = {"pos": 5, "fashion": 5, "define": 1, "voice": 2}  # steps of a draw of LISA
PLACEBO = ("define", "voice")  # where random layers are trained, too
CHOSEN = ("last", "probe", "random")  # whole layers, always the same ones
RATES = {  # in the middle of a grid; those of weights are for few layers
    "full": {"pos": 2e-4, "fashion": 1e-4, "define": 5e-5, "voice": 1e-4},
    "lora": {"pos": 1e-3, "fashion": 1e-3, "define": 1e-3, "voice": 1e-3},
    "lisa": {"pos": 5e-4, "fashion": 2e-4, "define": 2e-4, "voice": 1e-4},
    "ia3": {"pos": 1e-2, "fashion": 1e-2, "define": 1e-2, "voice": 1e-2},
    "prompt": {"pos": 3e-2, "define": 3e-2},
    "weights": {"pos": 1e-3, "fashion": 3e-4, "define": 2e-4, "voice": 2e-4},
    "bitfit": {"pos": 3e-3, "fashion": 3e-3, "define": 3e-3, "voice": 3e-3},
    "head": {"pos": 1e-2, "fashion": 1e-2, "define": 2e-4, "voice": 2e-4},
}
TARGETS = {  # of IA3: what it scales, and which of them are inside a feed-forward block
    "pos": (("key", "value", "output.dense"), ("output.dense",)),
    "fashion": (("key", "value", "fc2"), ("fc2",)),
    "define": (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    "voice": (("k_proj", "v_proj", "fc2"), ("fc2",)),
}


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Parameters
    ----------
    name
        As in DESIGN.md.
    centre
        Learning rate in the middle of its grid.
    words
        Gives the words of `lisa-train` for a seed.
    probed
        Whether it reads a probe, of the next seed.
    """

    name: str
    centre: float
    words: Callable[[int], list[str]]
    probed: bool = False


def tasks(work: Path) -> dict[str, Environment]:
    """Return the tasks of this study: shared environments, with sizes of its own."""
    known = environments(work)
    return {
        name: replace(
            known[name], steps=steps, batch=BATCHES[name], evaluated=EVALUATED[name],
            interval=PERIODS[name], centres={},
        )
        for name, steps in STEPS.items()
    }  # fmt: skip


def methods(task: Environment, probe: Callable[[int], Path]) -> list[Method]:
    """Return what a task is trained with.

    Parameters
    ----------
    task
        One of `tasks`.
    probe
        Gives the log of the probe that the runs of a seed read.
    """
    every = task.targets(range(task.layers))
    head = [HEADS] if task.head else []

    def select(layers: list[int]) -> list[str]:
        return ["--method=select", f"--select.layers={','.join(map(str, layers))}", *head]

    def probed(seed: int) -> list[str]:
        scores = la.importance(la.load(probe(seed)), "grad_signal").scores
        return select(task.top(list(scores)))

    def random(seed: int) -> list[str]:
        return select(task.top(list(np.random.default_rng(seed).random(task.layers))))

    targets, inside = (f"[{','.join(names)}]" for names in TARGETS[task.name])
    # Llama has no biases: what stands for them are the weights of its norms.
    small = "[.*bias]" if task.name != "define" else "[.*norm.weight]"
    words: dict[str, Callable[[int], list[str]]] = {
        "full": lambda seed: ["--method=full"],
        "lora": lambda seed: [
            "--method=lora", f"--lora.r={RANK}", f"--lora.lora_alpha={2 * RANK}",
            f"--lora.target_modules={every}",
        ],
        "lisa": lambda seed: [
            "--method=lisa", f"--lisa.activated_layers={task.drawn}",
            f"--lisa.interval_steps={task.interval}", "--lisa.sampling=balanced",
        ],
        "ia3": lambda seed: [
            "--method=peft", "--peft.peft_type=IA3", f"--peft.target_modules={targets}",
            f"--peft.feedforward_modules={inside}",
        ],
        "prompt": lambda seed: [
            "--method=peft", "--peft.peft_type=prompt_tuning", "--peft.num_virtual_tokens=16",
        ],
        "last": lambda seed: select(task.top([float(i) for i in range(task.layers)])),
        "probe": probed,
        "random": random,
        "bitfit": lambda seed: ["--method=select", f"--select.tensors={small}", *head],
        "head": lambda seed: ["--method=select", HEADS],
    }  # fmt: skip
    if task.name not in PLACEBO:
        del words["random"]
    rates = {name: RATES["weights" if name in CHOSEN else name] for name in words}
    return [
        Method(name, rates[name][task.name], words[name], probed=name == "probe")
        for name in words
        if task.name in rates[name]
    ]
