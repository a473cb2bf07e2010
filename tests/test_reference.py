"""The README's reference of the functions is what the table of functions says."""

from __future__ import annotations

from proxy.functions import DECLARED, VIEWS
from proxy.reference import BEGIN, END, markdown
from tests.servers import REPOSITORY


def test_reference_in_the_readme_is_current() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    made = readme.partition(f"{BEGIN}\n")[2].partition(f"\n{END}")[0]
    assert made == markdown(), "put what `python -m proxy.reference` prints between the markers"


def test_reference_names_every_function_and_view() -> None:
    reference = markdown()
    for name in (*(function.name for function in DECLARED), *VIEWS):
        assert f"`{name}" in reference
