"""PostgreSQL's frontend/backend protocol 3, without I/O: bytes in, messages out.

Invariant: nothing here opens a socket, awaits anything or knows about pg_background. Names are
those of the manual's chapter "Frontend/Backend Protocol".

From the wire upward:

=================  =============================================================================
`wire`             reads and writes the primitive types (IntN, String, ByteN); the one exception
`kinds`            the types of messages, and the groups that they form
`framing`          where messages begin and end in a stream, without decoding them
`startup`          the packets without a type byte: StartupMessage, SSLRequest, CancelRequest, …
`messages`         every typed message, one dataclass each, filed by the manual's sections
`errors`           `SQLError`, an error on its way to a client; names for the SQLSTATEs
`auth`             MD5 password authentication
`scram`            SCRAM-SHA-256, as client and as server
`values`           from the text form of a value to its binary form; type OIDs and sizes
=================  =============================================================================

Malformed input raises `ProtocolViolation` and nothing else, and no length field alone causes an
allocation. Strings are bytes; the session knows their encoding.
"""
