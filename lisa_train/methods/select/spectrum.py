"""Spectrum's choice: of each kind of matrix in the layers, those with the best signal to noise."""

import weakref

import torch
from torch import nn

from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.statistics.spectra import snr
from lisa_train.model.layer_map import LayerMap

_FOUND: "weakref.WeakKeyDictionary[nn.Module, dict[float, tuple[str, ...]]]"
_FOUND = weakref.WeakKeyDictionary()


def spectrum_choice(model: nn.Module, layer_map: LayerMap, share: float) -> tuple[str, ...]:
    """Names of the tensors that Spectrum (arXiv 2406.06623) lets train, by the weights alone.

    Matrices of one kind are those at the same place within the layers of one stack. Of n matrices
    of a kind the ⌊share·n⌋ with the highest SNR train, and their biases, as in its code; those
    that have no SNR (all zeros, or without noise) never do. Of several matrices in one tensor
    (experts) it is the mean. The first answer for a model is kept: training does not change it.

    Of a model without data (an estimate of memory) the lowest layers are taken: as many elements,
    and no other choice stores more for the backward pass.

    Raises
    ------
    ConfigError
        When the share of no kind is a whole matrix.
    """
    known = _FOUND.setdefault(model, {})
    if share not in known:
        known[share] = _choice(model, layer_map, share)
    return known[share]


def _choice(model: nn.Module, layer_map: LayerMap, share: float) -> tuple[str, ...]:
    tensors = dict(model.named_parameters())
    kinds: dict[tuple[str, str], list[str]] = {}
    for layer, stack in enumerate(layer_map.stacks):
        for name in layer_map.layers[layer]:
            if tensors[name].ndim in (2, 3):
                place = name.removeprefix(f"{layer_map.names[layer]}.")
                kinds.setdefault((stack, place), []).append(name)
    # A share such as 0.29 of 100 is 28.999… in binary.
    numbers = {kind: int(share * len(names) + 1e-9) for kind, names in kinds.items()}
    if not any(numbers.values()):
        most = max(map(len, kinds.values()), default=0)
        raise ConfigError(
            f"select.spectrum is {share}, which is less than one of the {most} layers of "
            f"{type(model).__name__}; give at least {1 / max(most, 1):.3g}."
        )
    chosen: list[str] = []
    for kind, names in kinds.items():
        if not numbers[kind]:
            continue
        if any(tensors[name].is_meta for name in names):
            chosen += names[: numbers[kind]]
            continue
        scores = {name: weight_snr(tensors[name]) for name in names}
        known = [name for name in names if scores[name] == scores[name]]
        chosen += sorted(known, key=lambda name: -scores[name])[: numbers[kind]]
    biases = [f"{name.removesuffix('.weight')}.bias" for name in chosen if name.endswith(".weight")]
    return (*chosen, *(name for name in biases if name in tensors))


def weight_snr(weight: torch.Tensor) -> float:
    """Spectrum's SNR of a matrix, or the mean of several; NaN where a matrix has none.

    The singular values are those of the Gram matrix of the shorter side in float64, computed on a
    CUDA device where there is one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrices = weight.detach().unsqueeze(0) if weight.ndim == 2 else weight.detach()
    found = 0.0
    for matrix in matrices:
        whole = matrix.to(device).double()
        gram = whole @ whole.T if whole.shape[0] <= whole.shape[1] else whole.T @ whole
        values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().cpu().numpy()
        found += snr(values, *whole.shape)
    return found / len(matrices)
