"""The throwaway server that tests can restart and whose pg_hba.conf they can change."""

from __future__ import annotations

import signal
import socket
import struct
import time
from collections.abc import Iterable

from proxy.demo.embedded import START_TIMEOUT, Cluster, ClusterError


class ChangingCluster(Cluster):
    """A `Cluster` whose files may change while it runs."""

    @property
    def running(self) -> bool:
        """Whether it runs: true between ``start`` and ``stop``."""
        return self._process is not None and self._process.poll() is None

    def restart(self, *, immediate: bool = False) -> None:
        """Stops and starts, on the same port."""
        self.stop(immediate=immediate)
        self.start()

    def set_hba(self, lines: Iterable[str] | None = None) -> None:
        """Replaces pg_hba.conf (``None``: by its first content) and reloads it if the server runs.

        When this returns, the new lines apply to new connections.
        """
        self.write("pg_hba.conf", self._hba if lines is None else lines)
        if self.running:
            self.reload()

    def reload(self) -> None:
        """Has the server reload its configuration files, and waits for that.

        Raises:
            ClusterError: pg_hba.conf is not valid.
        """
        assert self._process is not None
        before = self.log_size()
        self._process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + START_TIMEOUT
        while "received SIGHUP" not in self.log(before):
            if time.monotonic() > deadline:
                raise ClusterError("PostgreSQL did not reload its configuration")
            time.sleep(0.01)
        # The postmaster logs that line before it reads the files, but accepts nothing in between.
        self._knock()
        if "pg_hba.conf was not reloaded" in self.log(before):
            raise ClusterError(f"invalid pg_hba.conf: {self.log(before)}")

    def _knock(self) -> None:
        """Waits until the postmaster has accepted a connection, and answered an SSLRequest."""
        with socket.socket(socket.AF_UNIX) as knock:
            knock.settimeout(START_TIMEOUT)
            knock.connect(f"{self.socket_dir}/.s.PGSQL.{self.port}")
            knock.sendall(struct.pack("!ii", 8, 80877103))
            knock.recv(1)
