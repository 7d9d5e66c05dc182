"""A run over several ranks that one of them ends: the cause is told, by the rank that met it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_run import TINY, go
from torch.distributed import DistBackendError, DistNetworkError

from fastrot import assemble, config, dist, train
from fastrot.core import DamagedRecord
from fastrot.data.beton.read import Beton
from fastrot.data.beton.write import BetonOptions
from fastrot.data.prepare.convert import convert
from fastrot.training import session

ROOT = Path(__file__).parents[1]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.ddp
@pytest.mark.soak
@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_record_of_one_rank_is_told_without_a_traceback(pictures, tmp_path, rank):
    out = tmp_path / "a.beton"
    convert(BetonOptions(source="imagefolder", root=pictures, out=out, workers=0))
    args = [*TINY, "--data", str(out), "--out", str(tmp_path / "run"), "--hold-out", "0"]
    cfg = config.resolved(train.command_line(args))
    view = assemble.training_view(cfg)
    loader = assemble.open_loader(
        out, view, batch=cfg.batch, seed=cfg.seed, rank=rank, world=2, workers=0, enlarge=True
    )
    _, second, *_ = loader.epoch(0)
    row, contents = int(second.index[0]), Beton(out).contents
    data = bytearray(out.read_bytes())
    data[int(contents.ptr[row] + contents.size[row] // 2)] ^= 64
    out.write_bytes(data)
    done = subprocess.run(
        [*TWO, "fastrot/train.py", *args],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0
    name = "rank 1: " if rank else ""
    assert f"fastrot: {name}row {row} " in done.stderr
    assert (
        "fastrot/training/session.py" not in done.stderr
    )  # no traceback of ours; torchrun adds its own
    assert "another process" not in done.stderr


GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]:4711"
NCCL = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting"


@pytest.mark.parametrize(
    ("error", "world", "kind"),
    [
        (RuntimeError(GLOO), 2, config.PeerLost),
        (DistBackendError(NCCL), 2, config.PeerLost),
        (DistNetworkError("failed to recv, got 0 bytes"), 2, config.PeerLost),
        (RuntimeError(GLOO), 1, RuntimeError),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 2, RuntimeError),
        (DistBackendError("NCCL error: invalid usage"), 2, DistBackendError),
        (DamagedRecord("row 3 cannot be read: Connection reset by peer"), 2, DamagedRecord),
    ],
)
def test_a_lost_connection_is_told_from_other_faults(
    pictures, tmp_path, monkeypatch, error, world, kind
):
    def fails(*_):
        monkeypatch.setattr(dist, "world", lambda: world)
        raise error

    monkeypatch.setattr(session, "_built", fails)
    with pytest.raises(kind) as raised:
        go(pictures, tmp_path)
    assert type(raised.value) is kind
