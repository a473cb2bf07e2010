"""The console: a client that asks for the database pg_background_proxy talks to the proxy itself.

================  =============================================================================
`commands`        what can be said: the commands, and the errors for everything else
`tables`          what SHOW shows: columns, and the rows that one process knows
`process`         what a command does: in this process, and by `workers` in all of them
`door`            who gets in
`conversation`    the protocol, simple and extended, with one client that is in
================  =============================================================================

Invariant: the console knows no server. It shows what the processes of the proxy know, and nothing
that it does outlives the proxy. What a client may do is looked up anew for each command.
"""
