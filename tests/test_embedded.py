"""The throwaway server: it keeps its port, obeys its hba, and never stays behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest

from proxy.demo.embedded import Cluster, ClusterError
from tests.support.cluster import ChangingCluster
from tests.support.servers import REPOSITORY, Server

KILLED = """
import os, pathlib, signal, sys
from proxy.demo.embedded import Cluster
cluster = Cluster(pathlib.Path(sys.argv[1])).start()
print(cluster.directory, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_keeps_its_port_and_data_over_a_crash(server: Server) -> None:
    with ChangingCluster(server.bin) as cluster:
        conninfo = f"host={cluster.host} port={cluster.port} user=postgres connect_timeout=10"
        with psycopg.connect(conninfo, autocommit=True) as conn:
            conn.execute("CREATE TABLE kept ()")
            conn.execute("CHECKPOINT")
        cluster.restart(immediate=True)
        with psycopg.connect(conninfo) as conn:
            conn.execute("SELECT FROM kept")
            assert conn.info.server_version == cluster.version
        cluster.set_hba(["local all all reject"])
        with pytest.raises(psycopg.OperationalError, match=r"no pg_hba\.conf entry"):
            psycopg.connect(conninfo)
        with pytest.raises(ClusterError, match="invalid"):
            cluster.set_hba(["nonsense"])
    assert not cluster.directory.exists()


def test_a_server_that_cannot_start_says_why_and_leaves_nothing(server: Server) -> None:
    cluster = Cluster(server.bin, {"shared_buffers": "'much'"})
    with pytest.raises(ClusterError, match='invalid value for parameter "shared_buffers": "much"'):
        cluster.start()
    cluster.close()
    assert not cluster.directory.exists()


def test_it_goes_even_when_its_owner_is_killed(server: Server) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(server.bin)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    directory = Path(done.stdout.strip())
    assert directory.is_absolute()
    deadline = time.monotonic() + 20.0
    while directory.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not directory.exists()
