"""Adapters with layers put back: what is written acts as the adapter with those layers off."""

import contextlib
import errno
from types import SimpleNamespace

import pytest
import torch
from helpers_ablating import ADAPTERS, change_of, rows_of, trained_adapter
from peft import PeftModel

from lisa_analysis.contract.errors import ConfigError, RunDirectoryError
from lisa_train.command.ablate_restore import _write, _write_adapter, check_adapter
from lisa_train.measure.ablation.units import choose_units


@pytest.mark.parametrize("units", ["1", "0,2,head,norm,embed"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_what_is_written_is_what_was_measured(tmp_path, name, units):
    architecture, base, loaded = trained_adapter(tmp_path, name)
    change = change_of(loaded, tmp_path)
    groups = {part.unit for part in change.parts}
    words = [w for w in units.split(",") if w.isdecimal() or w in groups]
    _, parts = choose_units(words, change.parts, len(change))
    trained = SimpleNamespace(model=loaded, folder=tmp_path / "adapter", change=change)
    if name == "tokens" and "embed" in words:
        with pytest.raises(ConfigError, match="cannot be left out of an adapter's files"):
            check_adapter(trained, parts)
        return
    check_adapter(trained, parts)
    (tmp_path / "out").mkdir()
    _write_adapter(trained, parts, tmp_path / "out")
    batch = rows_of(architecture).collate(rows_of(architecture).rows[:2])
    with torch.no_grad():
        with change.put(parts, "base"):
            measured = loaded(**batch).logits
        again = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
        assert torch.equal(again(**batch).logits, measured)
        assert not torch.equal(loaded(**batch).logits, measured)


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), RunDirectoryError),
        (type("SafetensorError", (Exception,), {})("No space left"), RunDirectoryError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
    ids=["full", "full, in safetensors", "stopped"],
)
def test_what_is_not_written_whole_leaves_nothing_and_touches_nobody_elses(tmp_path, error, seen):
    def save(folder):
        (folder / "half").touch()
        raise error

    change = SimpleNamespace(
        as_found=contextlib.nullcontext, put=lambda *given: contextlib.nullcontext()
    )
    trained = SimpleNamespace(
        is_adapter=False, model=SimpleNamespace(save_pretrained=save), change=change
    )
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "notes.txt").write_text("mine")
    with pytest.raises(seen):
        _write(trained, [], SimpleNamespace(path=tmp_path / "out"))
    assert [path.name for path in tmp_path.rglob("*")] == ["out.tmp", "notes.txt"]
