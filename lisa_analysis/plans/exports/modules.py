"""The modules of a model, as its run directory lists them: what adapters and lists can name."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lisa_analysis.contract.errors import LisaError, suggest
from lisa_analysis.contract.layers import canonical_name, same_layers
from lisa_analysis.plans.sampling import own_activated_layers
from lisa_analysis.rundir.opening import opened

# What PEFT puts between the path of a module and the copy of it that trains whole.
COPY = ".modules_to_save."
# Heads of classifiers as PEFT knows them by its task types.
_KNOWN_HEADS = ("classifier", "score")


@dataclass(frozen=True)
class Module:
    """A module with a matrix: its path, its layer's position in the profile, and its shape.

    The shape is empty where it is not known: versions before 2026-11-28 wrote 4-bit weights packed.
    """

    path: str
    layer: int
    shape: tuple[int, ...]

    @property
    def leaf(self) -> str:
        """Last part of the path."""
        return self.path.rsplit(".", 1)[-1]

    @property
    def per_rank(self) -> int:
        """Parameters of an adapter of rank 1: inputs and outputs.

        Raises
        ------
        LisaError
            Where the shape is not known.
        """
        if not self.shape:
            raise LisaError(
                f"the run lists {self.path} packed to 4 bits, without the shape of the matrix: "
                "give a run of the model as it was before that, or make one anew."
            )
        return sum(self.shape)


@dataclass(frozen=True)
class ModelModules:
    """Modules of a model.

    Attributes
    ----------
    layer_names
        Paths of the layers.
    inside
        Matrices of attention and feed-forward parts within the layers, in order. Matrices that
        are no module of their own (the fused experts of a mixture) are left out: adapters on
        modules do not reach them.
    tensors
        Canonical names of all tensors of the base model, with the position of their layer, or None.
    fused
        Tensors of three dimensions within the layers: experts in one block.
    activated_layers
        k of LISA's own draws; None in any other run.
    whole
        Modules outside the layers that have to train whole beside adapters: those that the run's
        own adapter did, and what a classifier has around its base model.
    classifies
        Whether the model is a classifier.
    tied
        Second names of tensors that have another: no list of parameters has them.
    """

    layer_names: tuple[str, ...]
    inside: tuple[Module, ...]
    tensors: tuple[tuple[str, int | None], ...]
    kinds: tuple[str, ...]
    fused: tuple[str, ...]
    activated_layers: int | None = None
    whole: tuple[str, ...] = ()
    classifies: bool = False
    tied: frozenset[str] = frozenset()

    @classmethod
    def of(cls, run: Any, layer_names: Sequence[str]) -> "ModelModules":
        """Read a run's tensors.

        Parameters
        ----------
        run
            A run directory, opened or by its path; or anything else that lists the tensors of a
            model as one does.
        layer_names
            Layers of the profile, which the run must have.

        Raises
        ------
        LisaError
            When the run is of another model.
        """
        if not (hasattr(run, "parameters") and hasattr(run, "layer_names")):
            run = opened(run, "export")
        if not same_layers(run.layer_names, layer_names):
            raise LisaError(
                f"run {run.run_id} has {len(run.layer_names)} layers (first: "
                f"{run.layer_names[0] if run.layer_names else 'none'}), the profile "
                f"{len(layer_names)} ({layer_names[0]}): give the run that the profile came from."
            )
        frame = run.parameters
        frame = frame[frame["role"] == "base"]
        inside, tensors, kinds, fused = [], [], [], []
        for name, layer, kind, shape in zip(
            frame["name"], frame["layer"].fillna(-1), frame["kind"], frame["shape"], strict=True
        ):
            name, position = canonical_name(name), None if layer < 0 else int(layer)
            tensors.append((name, position))
            kinds.append(str(kind))
            sizes = tuple(int(size) for size in str(shape).split("x") if size)
            if position is None or not kind.startswith(("attn.", "mlp.")):
                continue
            if len(sizes) == 2 and name.endswith(".weight"):
                path = name.removesuffix(".weight")
                inside.append(Module(path, position, () if sizes[1] == 1 else sizes))
            elif len(sizes) == 3:
                fused.append(name)
        return cls(
            tuple(run.layer_names), tuple(inside), tuple(tensors), tuple(kinds), tuple(fused),
            own_activated_layers(run), _whole(run), _classifies(run),
            frozenset(map(canonical_name, frame["name"][frame["tied_to"].notna()])),
        )  # fmt: skip

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of every module that holds a tensor, inside the layers and outside."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name, _ in self.tensors))

    def leaves(self, wanted: Iterable[str] | None) -> tuple[str, ...]:
        """Last parts of the paths of all matrices, or the wanted ones of them.

        Raises
        ------
        LisaError
            For a name that no matrix within the layers has.
        """
        known = tuple(dict.fromkeys(module.leaf for module in self.inside))
        if not known:
            raise LisaError(
                "the layers have no matrices of attention or feed-forward parts: name "
                "target_modules without run=."
            )
        if not wanted:
            return known
        wanted = tuple(map(str, wanted))
        for name in wanted:
            if name not in known:
                raise LisaError(
                    f"target_modules holds {name!r}: expected names of matrices within the layers "
                    f"({', '.join(known)}).{suggest(name, known)}"
                )
        return wanted

    def of_group(self, group: str) -> tuple[str, ...]:
        """Names of the tensors outside the layers of one kind: embed, head, norm or other.

        A tensor has one name, the first: a head that is tied to the embeddings is one of `embed`.
        """
        return tuple(
            name
            for (name, layer), kind in zip(self.tensors, self.kinds, strict=True)
            if layer is None and kind == group and name not in self.tied
        )


def _whole(run: Any) -> tuple[str, ...]:
    """Paths of modules that train whole beside adapters, in order."""
    names = [str(name) for name in run.parameters["name"]]
    found = [_plain(name.partition(COPY)[0]) for name in names if COPY in name]
    if _classifies(run):
        found += _around_the_base(run)
    return tuple(dict.fromkeys(found))


def _classifies(run: Any) -> bool:
    """Whether a run's model is a classifier, by its task or, without one, its class."""
    manifest = getattr(run, "manifest", None) or {}
    model = manifest.get("model")
    architecture = model.get("architecture") if isinstance(model, dict) else None
    return str(manifest.get("task") or architecture or "").lower().endswith("classification")


def _around_the_base(run: Any) -> list[str]:
    """Modules beside the base model, which holds all layers.

    What a class of transformers has around it to classify (`classifier`, `score`, `projector`,
    `pre_classifier`, `classification_head.dense`, …) starts at random. What has embeddings is no
    head: there the model has no base of its own, and only names that PEFT knows are taken, as
    of names that other modules end with too (`norm`), for PEFT would take those as well.
    """
    frame = run.parameters[run.parameters["role"] == "base"]
    names = [_plain(str(name)) for name in frame["name"]]
    paths = {name.rpartition(".")[0] for name in names}
    bases = {_plain(layer).split(".", 1)[0] for layer in run.layer_names}
    firsts = dict.fromkeys(name.split(".", 1)[0] for name in names if "." in name)
    beside = [first for first in firsts if first not in bases]
    kinds: dict[str, set[str]] = {}
    for name, kind in zip(names, frame["kind"], strict=True):
        kinds.setdefault(name.split(".", 1)[0], set()).add(str(kind))
    if any("embed" in kinds[first] for first in beside):
        return [first for first in beside if first in _KNOWN_HEADS]
    return [
        first
        for first in beside
        if not any(p.endswith(first) and p.split(".", 1)[0] not in beside for p in paths)
    ]


def _plain(name: str) -> str:
    """Name in the model itself; a prompt of PEFT puts one part before it, adapters two."""
    return canonical_name(name).removeprefix("base_model.")
