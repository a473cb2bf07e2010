"""SQLError, and the ErrorResponse that it becomes."""

from __future__ import annotations

import pytest

from protocol import errors
from protocol.errors import ServerError, SQLError
from protocol.messages import ErrorResponse


def test_an_error_becomes_an_error_response_with_its_fields() -> None:
    error = SQLError(
        errors.UNDEFINED_OBJECT,
        "no such job",
        detail="It was detached.",
        hint="Launch another.",
        context="pg_background_result",
    )
    assert error.response().fields == {
        "S": b"ERROR",
        "V": b"ERROR",
        "C": b"42704",
        "M": b"no such job",
        "D": b"It was detached.",
        "H": b"Launch another.",
        "W": b"pg_background_result",
    }


def test_fields_that_are_not_given_are_not_sent() -> None:
    response = SQLError(errors.ADMIN_SHUTDOWN, "bye", severity="FATAL").response()
    assert response.fields == {"S": b"FATAL", "V": b"FATAL", "C": b"57P01", "M": b"bye"}


def test_what_the_encoding_cannot_hold_becomes_a_question_mark() -> None:
    error = SQLError(errors.INTERNAL_ERROR, "caf\u00e9 \u2603 a\0b \ud800")
    assert error.response("latin-1").message == b"caf\xe9 ? a?b ?"
    assert error.response().message == "caf\u00e9 \u2603 a?b ?".encode()
    error.response().serialize()


def test_an_error_says_what_it_is() -> None:
    assert str(SQLError("53400", "too many jobs")) == "too many jobs (SQLSTATE 53400)"


@pytest.mark.parametrize("name", [name for name in vars(errors) if name.isupper()])
def test_a_sqlstate_has_five_characters(name: str) -> None:
    sqlstate = getattr(errors, name)
    assert len(sqlstate) == 5
    assert sqlstate.isalnum()
    assert sqlstate == sqlstate.upper()


def test_a_servers_error_goes_on_with_all_its_fields() -> None:
    response = ErrorResponse(
        {
            "S": b"FEHLER",
            "V": b"FATAL",
            "C": b"57P01",
            "M": b"b\xe4d",
            "H": b"later",
            "q": b"SELECT 1",
        }
    )
    error = ServerError(response)
    assert error.response("latin-1") is response
    assert (error.sqlstate, error.message, error.hint) == ("57P01", "b\ufffdd", "later")
    assert (error.detail, error.severity, error.is_fatal) == (None, "FATAL", True)
    assert str(error) == "b\ufffdd"
