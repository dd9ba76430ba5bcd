"""What a run trained, by what it recorded: its method's name is for people."""

from lisa_analysis.rundir.run import Run


def has_adapters(run: Run) -> bool:
    """Whether parts of adapters are among the tensors of a run, of whatever type."""
    return bool((run.parameters["role"] != "base").any())


def has_low_rank(run: Run) -> bool:
    """Whether LoRA's A is among them: norms of raw factors, which begin as they are drawn."""
    return bool((run.parameters["role"] == "lora_A").any())
