"""How the ranks of a run are started and meet: on one machine in a private folder, on several by a secret they share.

torch's agents unpickle what their meeting point holds, and its TCP store listens on all interfaces and asks nobody who
he is: whoever reaches the port could run code. So one machine has no port at all, and between several only what is
signed with the secret is read.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import (
    RendezvousError,
    RendezvousHandler,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.api import RendezvousStateError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import RendezvousBackend, create_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from micl_zoo.errors import Interrupted, TrainingError, UsageError
from micl_zoo.extraction.processes import FIND_PACKAGE, child_environment, python

from .ranks import STORE

RANK = f"{FIND_PACKAGE}; from micl_zoo.training.__main__ import rank; rank()"
BACKEND = "micl-zoo"  # torch's name for `_signed`
SECRET = "MICL_ZOO_SECRET"  # variable with what the machines of a run share
LEAST_SECRET = 16  # characters
HEARTBEAT = 60  # seconds: each adds a kilobyte to the file by which one machine's agent meets itself
Settings = dict[str, Any]  # of torch's LaunchConfig
State = tuple[bytes, Any] | None  # of a rendezvous, and torch's token of it


def launch(
    words: Sequence[str],  # of `micl-zoo`, from `train` or `eval` on, without the options on the number of processes
    *,
    gpus: int = 1,  # processes on this machine, one per GPU
    nodes: int = 1,  # machines; the same call runs on each of them
    rdzv: str | None = None,  # rendezvous endpoint, "host:port" of one of the machines; required for more than one
    restarts: int = 0,  # how often all ranks start again, from the last checkpoint, after one has failed
) -> None:
    """Run `python -m micl_zoo.training WORDS` in `gpus` processes on this machine, by torchrun's elastic agent."""
    if nodes > 1 and not rdzv:
        raise UsageError("--nodes needs --rdzv HOST:PORT, the address of one machine, the same on all of them")
    # "$$": torch puts the rank's number in the place of ${local_rank}. Its log says of failures what is said below.
    command = [word.replace("$", "$$") for word in python(RANK, *words, flags=["-u"])[1:]]
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    os.environ |= child_environment()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // gpus)))
    how: Settings = {"nproc_per_node": gpus, "max_restarts": restarts, "monitor_interval": 0.5}
    with TemporaryDirectory(prefix="micl-zoo-") as folder:
        how |= over_the_network(rdzv) if nodes > 1 and rdzv else on_one_machine(Path(folder))
        how["logs_specs"] = DefaultLogsSpecs(folder)
        try:
            elastic_launch(LaunchConfig(nodes, nodes, **how), sys.executable)(*command)
        except ChildFailedError as error:
            raise _failed(error.failures) from None
        except SignalException as error:
            raise Interrupted("the ranks were told to stop; see their output above", signal=error.sigval) from None
        except RendezvousError as error:
            raise TrainingError(f"the machines do not meet at {rdzv}: {error}. Give all the same command") from None


def _failed(failures: Mapping[int, ProcessFailure]) -> TrainingError:
    """Say why the ranks have failed: one that was killed is why others did, which notice that it is gone."""
    rank, first = min(failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].timestamp))
    if first.exitcode > 0 and Path(first.error_file).is_file():
        return TrainingError(first.message)
    return TrainingError(f"rank {rank} ended with code {first.exitcode}; see its output above")


def leave_error(text: str) -> None:
    """Leave why this rank ends to the process that started all of them, which says it once."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(file).write_text(json.dumps({"message": text, "timestamp": int(time.time())}), encoding="utf-8")


def on_one_machine(folder: Path) -> Settings:
    """Meet by files in a folder that is this user's alone; gloo's connections stay on the loopback interface."""
    os.environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", STORE: str(folder / "ranks")}
    if loopback := next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None):
        os.environ["GLOO_SOCKET_IFNAME"] = loopback
    return {
        "rdzv_backend": "c10d",
        "rdzv_endpoint": str(folder / "agent"),
        "rdzv_configs": {"store_type": "file", "keep_alive_interval": HEARTBEAT},
        "run_id": secrets.token_hex(16),
        "local_addr": "127.0.0.1",
    }


def over_the_network(endpoint: str) -> Settings:
    """Meet at HOST:PORT of one of the machines, which torch serves on all its interfaces, by the shared secret."""
    try:
        parse_rendezvous_endpoint(endpoint, -1)
    except ValueError:
        raise UsageError(f"--rdzv takes HOST:PORT of one of the machines, as node1:29500, got {endpoint!r}") from None
    run = f"micl-zoo {os.environ.get('SLURM_JOB_ID', '')}".encode()
    rendezvous_handler_registry.register(BACKEND, _signed)
    return {
        "rdzv_backend": BACKEND,
        "rdzv_endpoint": endpoint,
        "run_id": hmac.new(_secret(), run, hashlib.sha256).hexdigest(),
    }


def _secret() -> bytes:
    secret = os.environ.get(SECRET, "")
    if len(secret) < LEAST_SECRET:
        raise UsageError(
            f"several machines need a secret, so that nobody else in their network can join them and run code: set "
            f"{SECRET} to the same {LEAST_SECRET} characters or more on each of them, such as those that "
            f"`openssl rand -hex 16` prints"
        )
    return secret.encode()


def _signed(parameters: RendezvousParameters) -> RendezvousHandler:
    backend, store = create_backend(parameters)
    return create_handler(store, Signed(backend, _secret()), parameters)


class Signed(RendezvousBackend):
    """A place for the state of a rendezvous, which its readers unpickle: only what holders of the secret have put."""

    def __init__(self, inner: RendezvousBackend, secret: bytes) -> None:
        self.inner, self.secret = inner, secret

    @property
    def name(self) -> str:
        """Name of the backend."""
        return BACKEND

    def get_state(self) -> State:
        """Return the state, and its token."""
        return self._checked(self.inner.get_state())

    def set_state(self, state: bytes, token: Any = None) -> Any:
        """Put a state where the token is that of the one there; return the one that is there then."""
        return self._checked(self.inner.set_state(self._signature(state) + state, token))

    def _signature(self, state: bytes) -> bytes:
        return hmac.digest(self.secret, state, "sha256")

    def _checked(self, found: Any) -> Any:
        if found is None:
            return None
        signed, *rest = found
        signature, state = signed[:32], signed[32:]
        if not hmac.compare_digest(signature, self._signature(state)):
            raise RendezvousStateError("what is there was not signed with this secret")
        return state, *rest
