"""The generated parts of docs/ are what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from proxy import config
from proxy.api.functions import DECLARED, VIEWS
from proxy.api.reference import (
    EXAMPLE,
    PAGES,
    configuration,
    example,
    functions,
    with_reference,
)
from proxy.config.gucs import GUCS
from tests.support.servers import REPOSITORY


@pytest.mark.parametrize("name", PAGES)
def test_page_is_current(name: str) -> None:
    page = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
    assert page == with_reference(page, PAGES[name]()), "run `python -m proxy.api.reference`"


def test_example_is_current() -> None:
    text = (REPOSITORY / EXAMPLE).read_text(encoding="utf-8")
    assert text == example(), "run `python -m proxy.api.reference`"


def test_example_has_the_defaults(tmp_path: Path) -> None:
    """Each line that is not a comment for people is one, less its first character."""
    lines = re.findall(r"^#(\w+) = (.*)$", example(), re.MULTILINE)
    assert [name for name, _ in lines] == [field.name for field in config.SETTINGS]
    defaults = {field.name for field in config.SETTINGS if field.metadata["default"]}
    file = tmp_path / "proxy.toml"
    file.write_text("\n".join(f"{name} = {text}" for name, text in lines if name in defaults))
    assert config.load(file=file) == config.load()


def test_reference_names_every_function_and_view() -> None:
    reference = functions()
    for name in (*(function.name for function in DECLARED), *VIEWS):
        assert f"`{name}" in reference


def test_reference_has_every_setting_and_its_default() -> None:
    reference = configuration()
    for field in config.SETTINGS:
        default = f" `{field.metadata['default']}`" if field.metadata["default"] else ""
        assert f"| `{field.name}` |{default} |" in reference
    for setting in GUCS.values():
        assert f"| `{setting.name}` | `{setting.default}` |" in reference


def test_every_table_has_its_heading() -> None:
    """A setting that is added after the last one of a group goes into that group's table."""
    lines = configuration().splitlines()
    for number, line in enumerate(lines):
        if line.startswith("| ---"):
            assert lines[number - 3].startswith("### ")
            assert lines[number - 2] == ""


def test_a_page_without_markers_is_an_error() -> None:
    with pytest.raises(ValueError, match="no markers"):
        with_reference("# A page", "| table |")
