"""A model without data: built from a configuration or copied from a module, on fake tensors."""

import contextlib
import copy
import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.contract.layers import role_of
from lisa_train.estimate.setting import Setting
from lisa_train.methods import METHODS
from lisa_train.methods.adapter_heads import train_heads_whole
from lisa_train.model.layer_map import LayerMap, find_layers
from lisa_train.model.module_tree import below, task_type_of, unwrap
from lisa_train.model.source import read_config
from lisa_train.model.towers import sense_towers
from lisa_train.optim.eight_bit import eight_bit_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Stage:
    """A model whose tensors have shape, dtype and storage, but no data.

    Parameters
    ----------
    source
        Module, transformers configuration, or folder or hub id of one.
    setting
        Decides dtype, attention and adapters.

    Attributes
    ----------
    model
        The model; its parameters are fake CPU tensors.
    mode
        The mode in which it lives and runs.
    base
        The model inside the adapters; itself where there are none.
    """

    def __init__(self, source: "nn.Module | PretrainedConfig | str | Path", setting: Setting):
        if isinstance(source, nn.Module):
            _refuse_wrapped(source)
            model = _copy_onto(source, "meta")
            _adjust(model, setting)
        else:
            model = _build(source, setting)
        method = METHODS[setting.method]
        method.prepare(model, setting)
        with quiet():
            peft_config = method.peft_config(setting, task_type_of(model))
        if peft_config is not None:
            model = _with_adapters(model, peft_config, setting)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            self.model: Any = _copy_onto(model, "cpu")
        self.base: Any = unwrap(self.model)
        self.layer_map = find_layers(self.base, setting.lisa.layers)
        self.blocks = tuple(self.base.get_submodule(name) for name in self.layer_map.names)
        self._labels = self._label_tensors()
        self.model.train()
        if setting.gradient_checkpointing:
            _checkpoint(self.base)
        if setting.chunked_loss:
            _fuse_head(self.base)

    def label(self, name: str) -> int:
        """Place of a parameter: its layer's index, -1 before the layers, their number after."""
        return self._labels.get(name, len(self.layer_map))

    def _label_tensors(self) -> dict[str, int]:
        """Labels of what lies in a layer (adapters too) or before them, by name in `model`."""
        places = {
            id(tensor): i
            for i, block in enumerate(self.blocks)
            for tensor in (*block.parameters(), *block.buffers())
        }
        embed = set(self.layer_map.groups["embed"])
        places.update({id(p): -1 for n, p in self.base.named_parameters() if n in embed})
        every = (self.model.named_parameters(remove_duplicate=False), self.model.named_buffers())
        labels = {}
        for name, tensor in itertools.chain(*every):
            if id(tensor) in places:
                labels[name] = places[id(tensor)]
            elif ".lora_embedding" in name or role_of(name) == "prompt":
                labels[name] = -1
        return labels

    def _images(self, count: int) -> dict[str, Any]:
        """Images of the size that the model's configuration names, and a class for each."""
        size = getattr(self.base.config, "image_size", None)
        if size is None:
            raise ConfigError(
                f"the configuration of {type(self.base).__name__} names no image_size, so that its "
                "training step cannot be run on shapes."
            )
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(self.base.config, "num_channels", 3)
        dtype = next(self.base.parameters()).dtype
        with self.mode:
            return {
                "pixel_values": torch.zeros((count, channels, height, width), dtype=dtype),
                "labels": torch.zeros(count, dtype=torch.long),
            }

    def _sounds(self, setting: Setting) -> dict[str, Any]:
        """Sounds as long as the encoder hears, and texts as long as asked for, or as it writes."""
        config = self.base.config
        try:
            frames = 2 * config.max_source_positions  # Whisper's convolutions halve them
            shape = (setting.batch_size, config.num_mel_bins, frames)
            length = min(setting.sequence_length, config.max_target_positions)
        except AttributeError as error:
            raise ConfigError(
                f"the configuration of {type(self.base).__name__} does not say how long its sounds "
                f"are ({error}), so that its training step cannot be run on shapes."
            ) from error
        dtype = next(self.base.parameters()).dtype
        with self.mode:
            return {
                "input_features": torch.zeros(shape, dtype=dtype),
                "labels": torch.zeros((setting.batch_size, length), dtype=torch.long),
                "use_cache": False,
            }

    def wide_states(self, setting: Setting) -> frozenset[int]:
        """Identities of the parameters whose state an 8-bit optimizer holds in 32 bits."""
        if setting.eight_bit_states is None:  # transformers: the embeddings
            modules = self.model.modules()
            return frozenset(id(m.weight) for m in modules if isinstance(m, nn.Embedding))
        small = eight_bit_parameters(self.base, self.layer_map, setting.eight_bit_states)
        return frozenset(id(p) for p in self.model.parameters() if p not in small)

    def batch(self, setting: Setting) -> dict[str, Any]:
        """Full sequences without padding, and the labels that make the model compute its loss."""
        accepted = inspect.signature(self.base.forward).parameters
        if {"pixel_values", "labels"} <= set(accepted) and "input_ids" not in accepted:
            return self._images(setting.batch_size)
        if {"input_features", "labels"} <= set(accepted):
            return self._sounds(setting)
        if not {"input_ids", "labels"} <= set(accepted):
            raise ConfigError(
                f"{type(self.base).__name__} takes no input_ids and labels, so that its training "
                "step cannot be run on shapes; estimate a text model with a head for its task."
            )
        shape = (setting.batch_size, setting.sequence_length)
        _check_positions(self.base, self.layer_map, setting.sequence_length)
        _check_experts(self.base)
        per_sequence = "SequenceClassification" in type(self.base).__name__
        with self.mode:
            ids = torch.zeros(shape, dtype=torch.long)
            labels = torch.zeros(shape[:1] if per_sequence else shape, dtype=torch.long)
        # Trainer turns the cache off.
        cache = {"use_cache": False} if "use_cache" in accepted else {}
        return {"input_ids": ids, "labels": labels, **cache}


def _build(source: "PretrainedConfig | str | Path", setting: Setting) -> nn.Module:
    """Build the model of a configuration on the meta device."""
    with quiet():
        import transformers
        from transformers import AutoModelForCausalLM, PretrainedConfig

        given = isinstance(source, PretrainedConfig)
        config: Any = copy.deepcopy(source) if given else read_config(source)
        named: Any = getattr(transformers, (config.architectures or ["?"])[0], None)
    dtype = setting.dtype if setting.dtype != "auto" else (config.dtype or torch.float32)
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    keywords = {"dtype": dtype, "attn_implementation": setting.attn_implementation}
    with torch.device("meta"), quiet():
        try:
            if named is not None:
                return named._from_config(config, **keywords)
            return AutoModelForCausalLM.from_config(config, **keywords)
        except (ValueError, TypeError, AttributeError, ImportError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"no model can be built from this {type(config).__name__} ({reason[:200]}); name "
                "its class in `architectures`, or hand over the model itself."
            ) from error


def _refuse_wrapped(module: nn.Module) -> None:
    if unwrap(module) is not module:
        raise ConfigError(
            f"the model is wrapped in {type(module).__name__}; hand over the plain model, and "
            "say with method and lora how it is to be trained."
        )
    packed = [n for n, p in module.named_parameters() if not p.is_floating_point()]
    if packed:
        raise ConfigError(
            f"{packed[0]} is quantized; only floating-point weights can be estimated."
        )


def _copy_onto(module: nn.Module, device: str) -> nn.Module:
    """Copy a module with every tensor replaced by an empty one; tied ones stay tied."""
    replaced: dict[int, Any] = {}
    for part in module.modules():
        own = [*part._parameters.values(), *part._buffers.values(), *vars(part).values()]
        own += [v for d in own if isinstance(d, dict) for v in d.values()]  # prompts of PEFT
        for tensor in own:
            if isinstance(tensor, torch.Tensor) and id(tensor) not in replaced:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                replaced[id(tensor)] = empty
    return copy.deepcopy(module, replaced)


def _adjust(model: Any, setting: Setting) -> None:
    """Give a module that somebody built the dtype and the attention of the setting."""
    if setting.dtype != "auto":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(getattr(torch, setting.dtype))
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(setting.attn_implementation)


def _with_adapters(base: Any, peft_config: Any, setting: Setting) -> nn.Module:
    """Wrap the model as PEFT does, with its own choice of targets."""
    with quiet():
        from peft import get_peft_model
    try:
        with torch.device("meta"), quiet():
            train_heads_whole(peft_config, base)
            return get_peft_model(
                base, peft_config, autocast_adapter_dtype=setting.autocast_adapter_dtype
            )
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"PEFT refuses the {setting.method} settings: {reason[:300]}") from error


def _checkpoint(base: Any) -> None:
    try:
        with quiet():
            base.gradient_checkpointing_enable({"use_reentrant": False})
    except (AttributeError, ValueError) as error:
        raise ConfigError(
            f"{type(base).__name__} has no gradient checkpointing; set gradient_checkpointing to "
            "false."
        ) from error


def _fuse_head(base: Any) -> None:
    """Give the model TRL's head that works in chunks, with the outputs that SFTTrainer asks for."""
    with quiet():
        from trl.trainer.utils import add_fused_lm_head

    causal = base.get_output_embeddings() is not None and base.base_model is not base
    if not causal or getattr(base.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"chunked_loss is TRL's, for causal language models; {type(base).__name__} is none, "
            "set it to false."
        )
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))


def _check_positions(base: nn.Module, layer_map: LayerMap, length: int) -> None:
    """Refuse a sequence that is longer than a table of positions; rotary ones have no end.

    Those of a tower of images or sounds count patches and frames.
    """
    towers = sense_towers(base, layer_map)
    for path, module in base.named_modules():
        if any(below(path, tower) for tower in towers):
            continue
        name = path.rpartition(".")[2]
        table = isinstance(module, nn.Embedding) and ("position" in name or name == "wpe")
        if table and module.num_embeddings < length:
            raise ConfigError(
                f"sequence_length is {length}, but {type(base).__name__} has "
                f"{module.num_embeddings} positions; give at most that."
            )


def _check_experts(base: Any) -> None:
    """Refuse experts in a precision for which torch knows no shapes of their grouped product."""
    config = base.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = any((getattr(config, name, 0) or 0) > 1 for name in names)
    dtype = next(base.parameters()).dtype
    if experts and dtype != torch.bfloat16:
        raise ConfigError(
            f"{type(base).__name__} has experts and weights in {str(dtype).removeprefix('torch.')}"
            "; experts can be estimated in bfloat16 only, set dtype to it."
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the notes and warnings of model construction."""
    import logging as stdlib_logging
    import warnings

    from transformers.utils import logging

    level = logging.get_verbosity()
    other = stdlib_logging.getLogger("bitsandbytes")  # which PEFT loads
    other_level = other.level
    logging.set_verbosity_error()
    other.setLevel(stdlib_logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        other.setLevel(other_level)
