"""The files in deploy/, the Dockerfile and docker-compose.yml: valid, and true.

No container runs here, but what one would run does: the same command, as the same user without
rights, in a file system of which nothing can be written, with the same files mounted.
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tomllib
import urllib.error
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
import yaml

from proxy import config
from proxy.demo.embedded import free_port
from tests.support import http
from tests.support.background import run, wait_until
from tests.support.servers import PASSWORDS, REPOSITORY, STOP_TIMEOUT, Server, running

MANIFEST: Final = REPOSITORY / "deploy" / "kubernetes.yaml"
COMPOSE: Final = REPOSITORY / "docker-compose.yml"
DOCKERFILE: Final = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")

ROLE: Final = "pw_scram"
UID: Final = 6543


def objects() -> dict[str, Any]:
    """What the manifest makes, by kind."""
    return {found["kind"]: found for found in yaml.safe_load_all(MANIFEST.read_text())}


def pod() -> Any:
    return objects()["Deployment"]["spec"]["template"]["spec"]


def container() -> Any:
    [found] = pod()["containers"]
    return found


def mounted() -> dict[str, str]:
    """The files that the container finds, by path: their texts."""
    sources = {
        "config": objects()["ConfigMap"]["data"],
        "secrets": objects()["Secret"]["stringData"],
    }
    return {
        f"{mount['mountPath']}/{name}": text
        for mount in container()["volumeMounts"]
        for name, text in sources[mount["name"]].items()
    }


# Valid


def test_kubernetes_takes_the_manifest() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    for found in yaml.safe_load_all(MANIFEST.read_text()):
        validator.validate(found, validator.latest_version(), strict=True)


def test_compose_takes_its_file() -> None:
    for command in (["docker", "compose"], ["docker-compose"]):
        with contextlib.suppress(OSError):
            version = subprocess.run([*command, "version"], capture_output=True, check=False)
            if version.returncode == 0:
                done = subprocess.run(
                    [*command, "-f", COMPOSE, "config", "--quiet"],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, done.stderr
                return
    pytest.skip("no docker compose found")


def test_haproxy_takes_what_the_manual_has_for_it(tmp_path: Path) -> None:
    program = shutil.which("haproxy", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        pytest.skip("no haproxy found")
    page = (REPOSITORY / "docs" / "operation.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\n(listen .*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    timeouts = "".join(f"    timeout {which} 1h\n" for which in ("connect", "client", "server"))
    for block in blocks:
        (tmp_path / "haproxy.cfg").write_text(f"defaults\n{timeouts}{block}")
        done = subprocess.run(
            [program, "-c", "-f", tmp_path / "haproxy.cfg"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "WARNING" not in done.stderr


def test_the_manual_has_each_unit_installed() -> None:
    page = (REPOSITORY / "docs" / "operation.md").read_text(encoding="utf-8")
    for unit in (REPOSITORY / "deploy" / "systemd").iterdir():
        assert f"\ncp deploy/systemd/{unit.name} /etc/systemd/system/\n" in page


# What belongs together


def test_the_parts_of_the_manifest_fit_together() -> None:
    made = objects()
    spec = made["Deployment"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    for selector in (
        spec["selector"]["matchLabels"],
        made["Service"]["spec"]["selector"],
        made["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector == labels
    names = {"config": ("configMap", "name"), "secrets": ("secret", "secretName")}
    for volume in pod()["volumes"]:
        kind, key = names[volume["name"]]
        assert volume[kind][key] == made[kind[0].upper() + kind[1:]]["metadata"]["name"]
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    settings = tomllib.loads(made["ConfigMap"]["data"]["proxy.toml"])
    assert settings["listen"] == f"*:{ports['postgresql']}"
    assert settings["admin_listen"] == f"*:{ports['admin']}"
    assert container()["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "admin"}
    assert container()["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "admin"}
    assert {path for path in settings.values() if "/" in str(path)} <= mounted().keys()
    assert container()["args"][-1] in mounted()


def test_a_pod_is_given_the_time_that_the_proxy_takes_to_end(tmp_path: Path) -> None:
    [_, pause] = container()["lifecycle"]["preStop"]["exec"]["command"]
    file = tmp_path / "proxy.toml"
    settings = tomllib.loads(objects()["ConfigMap"]["data"]["proxy.toml"])
    file.write_text(f'shutdown_timeout = "{settings["shutdown_timeout"]}"\n')
    end = config.load(file=file).shutdown_timeout + 10
    assert pod()["terminationGracePeriodSeconds"] >= int(pause) + end


def test_the_container_has_no_rights() -> None:
    for key, wanted in {
        "runAsNonRoot": True,
        "runAsUser": UID,
        "runAsGroup": UID,
        "fsGroup": UID,
        "seccompProfile": {"type": "RuntimeDefault"},
    }.items():
        assert pod()["securityContext"][key] == wanted
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod()["automountServiceAccountToken"] is False
    assert f"\nUSER {UID}:{UID}\n" in DOCKERFILE
    service = yaml.safe_load(COMPOSE.read_text())["services"]["proxy"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


# Run as a container would be


ROOT: Final = """
set -eu
mount --make-rprivate /
mount -t tmpfs -o mode=0755 root "$ROOT"
if [ -n "$TMP" ]; then mkdir "$ROOT/tmp"; mount -t tmpfs tmp "$ROOT/tmp"; fi
for folder in $FOLDERS; do
    mkdir -p "$ROOT$folder"
    mount --bind "$folder" "$ROOT$folder"
    mount -o remount,bind,ro "$ROOT$folder"
done
mkdir "$ROOT/proc" "$ROOT/dev"
mount --bind /proc "$ROOT/proc"
mount --bind /dev "$ROOT/dev"
cp -a "$FILES/." "$ROOT/"
mount -o remount,bind,ro "$ROOT"
exec chroot "$ROOT" setpriv --reuid=6543 --regid=6543 --clear-groups --no-new-privs \
    --bounding-set=-all --inh-caps=-all "$@"
"""


@pytest.fixture
def sandbox(tmp_path: Path) -> Path:
    """A folder where a root can be; skips the test where none can be made."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can make such a file system")
    allowed = subprocess.run(
        ["unshare", "--mount", "mount", "--make-rprivate", "/"], capture_output=True, check=False
    )
    if allowed.returncode != 0:
        pytest.skip("there are no mount namespaces")
    (tmp_path / "root").mkdir()
    (tmp_path / "files").mkdir()
    return tmp_path


@pytest.fixture
def role(server: Server) -> Iterator[str]:
    """A role that needs a password, and may launch jobs."""
    with server.connect() as conn:
        conn.execute(f"ALTER ROLE {ROLE} SUPERUSER")
        yield ROLE
        conn.execute(f"ALTER ROLE {ROLE} NOSUPERUSER")


@contextlib.contextmanager
def contained(
    sandbox: Path, command: list[str], *, environment: Mapping[str, str], tmp: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A command with nothing to write to, but perhaps /tmp."""
    folders = ["/usr", "/bin", "/lib", "/lib64", sys.base_prefix, sys.prefix, str(REPOSITORY)]
    script = {
        "ROOT": str(sandbox / "root"),
        "FILES": str(sandbox / "files"),
        "FOLDERS": " ".join(folder for folder in folders if Path(folder).exists()),
        "TMP": "yes" if tmp else "",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    whole = ("unshare", "--mount", "sh", "-c", ROOT, "sh", *command)
    with running(*whole, log=sandbox / "log", env={**script, **environment}) as process:
        yield process


def log_of(sandbox: Path) -> str:
    return (sandbox / "log").read_text(errors="replace")


def is_ready(url: str) -> bool:
    try:
        return http.ask(f"{url}/readyz").status == 200
    except urllib.error.URLError:
        return False


def test_what_kubernetes_runs_needs_no_rights_and_nothing_to_write_to(
    server: Server, sandbox: Path, role: str
) -> None:
    port, admin = free_port(), free_port()
    values = {
        '"*:6543"': f'"127.0.0.1:{port}"',
        '"*:6544"': f'"127.0.0.1:{admin}"',
        "host=postgres port=5432": f"host={server.host} port={server.port}",
        '"pgbg"': f'"{role}"',
    }
    secret = {
        "passfile": f"*:*:*:{role}:{PASSWORDS[role]}\n",
        "replicas": base64.b64encode(secrets.token_bytes(48)).decode(),
    }
    for path, text in mounted().items():
        file = sandbox / "files" / path[1:]
        file.parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(".toml"):
            for old, new in values.items():
                assert old in text
                text = text.replace(old, new)
            file.write_text(text)
        else:
            # As the kubelet mounts them: root's, and readable by the fsGroup.
            file.touch(mode=0o440)
            file.write_text(secret[file.name])
            os.chown(file, 0, pod()["securityContext"]["fsGroup"])
            [volume] = [v for v in pod()["volumes"] if "secret" in v]
            file.chmod(volume["secret"]["defaultMode"])
    command = [entrypoint(), *container()["args"]]
    with contained(sandbox, command, environment={}) as process:
        url = f"http://127.0.0.1:{admin}"
        wait_until(lambda: process.poll() is not None or is_ready(url))
        assert process.poll() is None, log_of(sandbox)
        assert http.ask(f"{url}/healthz").status == 200
        status = Path(f"/proc/{process.pid}/status").read_text()
        assert re.search(rf"^Uid:\s+{UID}\s+{UID}\s", status, re.MULTILINE)
        assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
        for folder in ("/", "/etc", "/run", "/usr", str(REPOSITORY)):
            assert is_read_only(process.pid, folder)
        launches(role, port)
        wait_until(lambda: "other replicas can be asked now" in log_of(sandbox))
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_TIMEOUT) == 0, log_of(sandbox)
    assert "Traceback" not in log_of(sandbox)


def test_what_compose_runs_needs_no_rights_and_writes_to_tmp_only(
    server: Server, sandbox: Path, role: str
) -> None:
    service = yaml.safe_load(COMPOSE.read_text())["services"]["proxy"]
    assert service["tmpfs"] == ["/tmp"]
    [script] = service["command"]
    port = free_port()
    for old, new in {
        "$$": "$",
        "'*:6543'": f"127.0.0.1:{port}",
        "host=postgres": f"host={server.host} port={server.port}",
        "*:*:*:postgres:": f"*:*:*:{role}:",
    }.items():
        assert old in script
        script = script.replace(old, new)
    command = [*service["entrypoint"], script]
    password = {"POSTGRES_PASSWORD": PASSWORDS[role]}
    with contained(sandbox, command, environment=password, tmp=True) as process:
        wait_until(lambda: process.poll() is not None or "listening on" in log_of(sandbox))
        assert process.poll() is None, log_of(sandbox)
        assert is_read_only(process.pid, "/")
        assert not is_read_only(process.pid, "/tmp")
        launches(role, port)
        assert "WARNING" not in log_of(sandbox)
        assert PASSWORDS[role].encode() not in Path(f"/proc/{process.pid}/environ").read_bytes()
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_TIMEOUT) == 0, log_of(sandbox)


def entrypoint() -> str:
    found = re.search(r'^ENTRYPOINT \["([^"]+)"\]$', DOCKERFILE, re.MULTILINE)
    assert found is not None
    return found[1]


def is_read_only(pid: int, folder: str) -> bool:
    """Whether a process could not write there if it were root."""
    return bool(os.statvfs(f"/proc/{pid}/root{folder}").f_flag & os.ST_RDONLY)


def launches(role: str, port: int) -> None:
    """A job logs in with what the proxy was given."""
    with psycopg.connect(
        f"host=127.0.0.1 port={port} dbname=postgres user={role}",
        password=PASSWORDS[role],
        autocommit=True,
    ) as conn:
        assert run(conn, "SELECT current_user::text") == [(role,)]
