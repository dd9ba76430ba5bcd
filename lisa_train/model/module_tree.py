"""Questions about a tree of modules: wrappers, stacks of blocks, embeddings, paths."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from lisa_analysis.contract.errors import ConfigError
from lisa_analysis.contract.layers import canonical_name


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, data-parallel and PEFT wrappers."""
    bare: Any = model
    while True:
        if isinstance(getattr(bare, "_orig_mod", None), nn.Module):
            bare = bare._orig_mod
        elif isinstance(bare, nn.DataParallel | nn.parallel.DistributedDataParallel):
            bare = bare.module
        elif hasattr(bare, "peft_config") and hasattr(bare, "get_base_model"):
            bare = bare.get_base_model()
        else:
            return bare


# End of a class name -> PEFT's word for what such a model is for.
_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}


def task_type_of(model: nn.Module) -> str | None:
    """Return PEFT's word for what a transformers model is for; None where it has none.

    It decides which tensors of a head train beside adapters, and how a prompt is put in front.
    """
    bare = unwrap(model)
    name = type(bare).__name__
    for end, word in _TASK_TYPES.items():
        if name.endswith(end):
            return word
    reads_text = getattr(bare, "main_input_name", None) == "input_ids"
    if name.endswith("ForConditionalGeneration") and reads_text:
        both = getattr(getattr(bare, "config", None), "is_encoder_decoder", False)
        return "SEQ_2_SEQ_LM" if both else "CAUSAL_LM"
    return None


@dataclass(frozen=True)
class Stack:
    """Repeated blocks: the canonical path of what holds them, and the blocks by their key in it.

    A block that stands in several places is here several times.
    """

    path: str
    blocks: tuple[tuple[str, nn.Module], ...]

    def __str__(self) -> str:
        count = len({id(block) for _, block in self.blocks})
        return f"{self.path}: {count} layers"


def stacks(model: nn.Module) -> list[Stack]:
    """Outermost lists of blocks, in the order of `named_modules`."""
    found: list[Stack] = []
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside or not is_list(children := children_of(module)):
            continue
        if all(_matrices(block) >= 2 for _, block in children):
            found.append(Stack(canonical_name(name), tuple(children)))
            inside.update(id(part) for part in module.modules())
    return found


def children_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children of a module by name; one that stands in two places twice, unlike torch."""
    every = module.named_modules(remove_duplicate=False)
    return [(name, child) for name, child in every if name and "." not in name]


def holds_blocks(module: nn.Module) -> bool:
    """Whether a module can be named as the one that holds the layers: a list, or a dict."""
    return is_list(children_of(module)) or (isinstance(module, nn.ModuleDict) and len(module) > 0)


def is_list(children: list[tuple[str, nn.Module]]) -> bool:
    """Whether children are numbered 0, 1, …: `ModuleList`, `Sequential` and their subclasses."""
    return bool(children) and [name for name, _ in children] == [
        str(i) for i in range(len(children))
    ]


def _matrices(block: nn.Module) -> int:
    """Number of weights with two or more dimensions: a convolution with its norm has one."""
    return sum(p.ndim >= 2 or hasattr(p, "quant_state") for p in block.parameters())


def embeddings_path(bare: nn.Module) -> str | None:
    """Canonical path of the token embeddings, or None when the model has none."""
    return _path(bare, module_from(bare, "get_input_embeddings"))


def output_head(bare: nn.Module) -> nn.Module | None:
    """Return the output embeddings (`lm_head`), or None."""
    return module_from(bare, "get_output_embeddings")


def module_from(bare: nn.Module, method: str) -> nn.Module | None:
    """Return the module that the method called `method` returns, or None.

    A model may lack the method, or say that it has no such module (`NotImplementedError`).

    Raises
    ------
    ConfigError
        When the method fails in another way: taken for a model without embeddings or a head, the
        model would leave tensors unnamed that are theirs.
    """
    if (ask := getattr(bare, method, None)) is None:
        return None
    try:
        module = ask()
    except NotImplementedError:
        return None
    except Exception as error:
        raise ConfigError(
            f"{method}() of {type(bare).__name__} fails ({type(error).__name__}: {error}); let it "
            "return the module, or None where the model has none."
        ) from error
    return module if isinstance(module, nn.Module) else None


def _path(bare: nn.Module, module: nn.Module | None) -> str | None:
    return next((canonical_name(n) for n, m in bare.named_modules() if m is module), None)


def shared_depth(a: str, b: str) -> int:
    """Number of leading path components that two modules share."""
    depth = 0
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        depth += 1
    return depth


def parameter_ids(module: nn.Module | None) -> frozenset[int]:
    """Identities of the parameters of a module; empty for None."""
    return frozenset(id(p) for p in module.parameters()) if module is not None else frozenset()


def below(path: str, ancestor: str) -> bool:
    """Whether `path` is `ancestor` or lies below it."""
    return path == ancestor or path.startswith(ancestor + ".")


def common_path(paths: list[str]) -> str:
    """Longest module path that all paths start with."""
    shared = paths[0].split(".")
    for path in paths[1:]:
        shared = shared[: shared_depth(".".join(shared), path)]
    return ".".join(shared)


def resting_tower(path: str, rotating: list[str]) -> str:
    """Highest ancestor of a resting stack that holds no rotating one: `model.vision_tower`."""
    parts = path.split(".")
    for depth in range(1, len(parts) + 1):
        ancestor = ".".join(parts[:depth])
        if not any(below(stack, ancestor) for stack in rotating):
            return ancestor
    return path
