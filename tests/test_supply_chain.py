"""What comes from elsewhere is bounded, and what the container gets is named by its hash."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import requires, version
from typing import Final

from packaging.requirements import Requirement

from tests.support.servers import REPOSITORY

_IN_THE_CONTAINER: Final = {"python_version": "3.13", "python_full_version": "3.13.9", "extra": ""}


def test_dependencies_have_bounds_on_both_sides() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    for text in (*project["dependencies"], *extras):
        requirement = Requirement(text)
        if requirement.name == "pg-background-proxy":
            continue
        operators = sorted(specifier.operator for specifier in requirement.specifier)
        assert operators == ["<", ">="], text
    for text in project["dependencies"]:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(version(requirement.name)), text


def test_the_container_is_made_of_what_was_looked_at() -> None:
    lock = re.sub(r"#.*|\\\n", "", (REPOSITORY / "requirements.lock").read_text())
    locked = dict(line.split(maxsplit=1) for line in lock.splitlines() if line.strip())
    for hashes in locked.values():
        assert re.fullmatch(r"( *--hash=sha256:[0-9a-f]{64})+ *", hashes)
    names = {requirement.partition("==")[0]: requirement for requirement in locked}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    admin = project["project"]["optional-dependencies"]["admin"]
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"], *admin]
    needed: set[str] = set()
    while wanted:
        requirement = Requirement(wanted.pop())
        name = requirement.name.replace("_", "-")
        if requirement.marker is None or requirement.marker.evaluate(_IN_THE_CONTAINER):
            assert requirement.specifier.contains(names[name].partition("==")[2])
            if name not in needed:
                needed.add(name)
                wanted += (requires(name) or ()) if name != "setuptools" else ()  # has none
    assert needed == names.keys()
    for file, word in (("Dockerfile", "FROM"), ("docker-compose.yml", "image:")):
        images = re.findall(rf"^\s*{word} (\S+)", (REPOSITORY / file).read_text(), re.MULTILINE)
        assert images
        for image in images:
            assert re.fullmatch(r"[a-z]+:[0-9.a-z-]+@sha256:[0-9a-f]{64}", image)
