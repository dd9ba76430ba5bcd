"""The one way in which tests start several processes: at home on this machine, loud when they fail.

Every process speaks over the loopback device by its address, whatever this machine is called and
whether anybody can resolve that. The test's own process keeps the store at which they meet, on a
port that the system gave it. The processes are forked from one that has imported what trainings
need, once for all tests of a worker: importing it anew takes longer than most of these tests.
"""

import faulthandler
import functools
import gc
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

HERE = Path(__file__).parent
TIMEOUT = 240  # seconds; a hang, which no test should wait for longer
_GRACE = 5  # seconds in which the others may end by themselves after the first has failed
_STARTS = 3  # how often processes that died before they had formed a group are started
_IMPORTED = ["lisa_train", "transformers.trainer", "trl.trainer.sft_trainer", "peft", __name__]
# Characters of a process's output that a failure shows: of the hundred frames that the fault
# handler writes the innermost come first.
_SAID = 15_000


def environment():
    """Return the variables of a child: one thread, offline, and gloo on the loopback device."""
    known = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MASTER_ADDR": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(map(str, (HERE.parent, HERE))),
        "PYTHONFAULTHANDLER": "1",  # a process that is aborted says where its threads stood
    }  # fmt: skip
    if sys.platform == "linux":
        known["GLOO_SOCKET_IFNAME"] = "lo"
    return known


def _is_marked():
    """Refuse a test that `make processes` would pass over."""
    markers = os.environ.get("TEST_MARKERS", "processes").split()  # not set outside of pytest
    assert {"processes", "gpu", "benchmark"} & {*markers}, "mark this test with `processes`"


def torchrun(words, *, processes=2, fails=False):
    """Run `torchrun … words` as a user would; return what it did and said.

    `fails`: whether the test expects it to; otherwise a failure shows what the processes said.
    """
    _is_marked()
    # Without an address of its own it takes this machine's name, which not every machine resolves.
    launcher = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *launcher, *map(str, words)],
            env=environment(), cwd=HERE.parent, capture_output=True, text=True, check=False,
            timeout=TIMEOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired as hang:
        said = [(part or b"").decode(errors="replace") for part in (hang.stdout, hang.stderr)]
        raise AssertionError(_story("torchrun did not end", said)) from None
    if (done.returncode != 0) != fails:
        what = "torchrun did not fail" if fails else f"torchrun ended with {done.returncode}"
        raise AssertionError(_story(what, [done.stdout, done.stderr]))
    return done


def ranks(function, folder, *arguments, world=2, backend="gloo"):
    """Call `function(rank, folder, *arguments)` in as many processes, which form a group.

    With `backend` nccl each has the GPU of its number.
    """
    _started((function, folder, arguments), world, backend)


def launched(function, folder, *arguments, world=2):
    """Call `function(rank, folder, *arguments)` in as many processes, as torchrun would start them.

    They have its variables, and the store of its agent at which to meet; to form a group is theirs.
    Return what each said, both streams in one text. Torchrun itself has every process import
    everything anew, which takes longer than most commands of a test.
    """
    return _started((function, folder, arguments), world, None)


def _started(call, world, backend):
    """Start the processes, again if they met nobody; return what each said."""
    _is_marked()
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(_STARTS):
            failure = _together(call, scratch, world, backend)
            if failure is None:
                return [_said(scratch, rank) for rank in range(world)]
            if any(Path(scratch, f"formed-{rank}").exists() for rank in range(world)):
                break
            # gloo and the store are not what is tested here; the next start tells.
            print(f"no group was formed: {failure}", file=sys.stderr)
    raise AssertionError(failure)


def _together(call, scratch, world, backend):
    """Start the processes and wait; return None, or what went wrong."""
    function, folder, arguments = call
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = []
    for rank in range(world):
        said = Path(scratch, f"said-{rank}")
        said.unlink(missing_ok=True)
        words = (function.__module__, function.__qualname__, folder, arguments)
        place = (rank, world, store.port, scratch, backend)
        process = _forking().Process(target=_process, args=(said, environment(), words, place))
        process.start()
        started.append(process)
    end = time.monotonic() + TIMEOUT
    while (codes := [p.exitcode for p in started]).count(None) and time.monotonic() < end:
        if any(codes):
            end = min(end, time.monotonic() + _GRACE)
        time.sleep(0.02)
    for process in started:
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGABRT)  # the fault handler writes down where it stands
        process.join()
    if not any(codes) and None not in codes:
        return None
    outputs = [_said(scratch, rank) for rank in range(world)]
    ends = ("did not end" if code is None else f"ended with {code}" for code in codes)
    what = ", ".join(f"process {rank} {how}" for rank, how in enumerate(ends))
    return _story(what, [text for text, code in zip(outputs, codes, strict=True) if code != 0])


def _said(scratch, rank):
    """Return what a process has said so far.

    Without the names of a hundred modules, by which the fault handler ends: longer than what is
    shown of a process, they would hide where it stood.
    """
    lines = Path(scratch, f"said-{rank}").read_text(errors="replace").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("Extension modules: "))


def _story(what, outputs):
    """Return one sentence with the last line of the first output, then the ends of all."""
    last = next((text.strip().splitlines()[-1] for text in outputs if text.strip()), "nothing said")
    return "\n".join([f"{what}: {last}", *(output[-_SAID:] for output in outputs)])


@functools.cache
def _forking():
    """Return what forks processes from one that has imported everything and runs no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with mock.patch.dict(os.environ, environment()):  # what it imports reads them
        forkserver.ensure_running()
    return context


def _process(said, variables, call, place):
    """Be one of the processes."""
    with said.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # pytest's own streams are not this process's.
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable(sys.stderr)
    try:
        _join(variables, call, place)
    except BaseException as error:
        traceback.print_exc()
        code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1
    else:
        code = 0
    # A reducer of DDP in a reference cycle may be the last to hold the group. Its destructor keeps
    # the interpreter's lock and joins a thread of gloo that waits for it: no end, or SIGABRT.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join(variables, call, place):
    """Form the group, call the function, and wait for the others."""
    module, name, folder, arguments = call
    rank, world, port, scratch, backend = place
    os.chdir(HERE.parent)
    os.environ.clear()
    os.environ |= {
        **variables, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }  # fmt: skip
    if backend is None:
        os.environ |= {
            "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1", "ROLE_NAME": "default",
            "ROLE_RANK": str(rank), "ROLE_WORLD_SIZE": str(world), "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
    torch.set_num_threads(1)
    function = getattr(importlib.import_module(module), name)
    gc.freeze()  # as in conftest.py: a training collects what it made, not all that was imported
    os.fsync = lambda descriptor: None  # what is written is read by the test at once
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    if backend is not None:
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        dist.barrier()
    Path(scratch, f"formed-{rank}").touch()
    function(rank, folder, *arguments)
    # Who leaves early cuts off what another has yet to read; through the store nobody is cut off.
    store.set(f"done/{rank}", "")
    store.wait([f"done/{r}" for r in range(world)], timedelta(seconds=TIMEOUT))
    if dist.is_initialized():
        dist.destroy_process_group()
