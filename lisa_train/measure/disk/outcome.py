"""How a run ended, in one word and one sentence."""


def outcome(error: BaseException | None) -> tuple[str, str | None]:
    """Return the status and the sentence of a run that ended with `error`, or without one."""
    if error is None:
        return "finished", None
    if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
        return "interrupted", None
    return "failed", one_sentence(error)


def one_sentence(error: BaseException) -> str:
    """Return an exception as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__
