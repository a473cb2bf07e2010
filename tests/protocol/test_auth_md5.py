"""MD5 password authentication, against known answers."""

from __future__ import annotations

import pytest

from protocol.auth import md5_password, md5_response_from_secret, md5_secret

# SELECT 'md5' || md5('sekret' || 'alice'), and with it 'md5' || md5(… || 'salt'), on PostgreSQL.
SECRET = b"md5d423c1ac580865346a9953de773315b5"
RESPONSE = b"md5e64cc1bc31137a9b1f08d83712c9f311"


def test_the_secret_is_what_the_server_stores() -> None:
    assert md5_secret(b"alice", b"sekret") == SECRET


def test_the_response_can_be_made_from_the_password_and_from_the_secret() -> None:
    assert md5_password(b"alice", b"sekret", b"salt") == RESPONSE
    assert md5_response_from_secret(SECRET, b"salt") == RESPONSE


@pytest.mark.parametrize("secret", [b"", b"sekret", SECRET[3:], SECRET + b"0", SECRET.upper()])
def test_what_is_no_secret_is_refused_without_repeating_it(secret: bytes) -> None:
    with pytest.raises(ValueError, match=r"^not an MD5 secret$"):
        md5_response_from_secret(secret, b"salt")
