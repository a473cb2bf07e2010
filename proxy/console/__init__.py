"""The console: clients that ask for the database pg_background_proxy talk to the proxy itself.

================  =============================================================================
`commands`        the commands, and the errors for everything else
`tables`          what SHOW shows: columns, and the rows that one process knows
`actions`         what a command does: in this process, and by `workers` in all of them
`login`           who gets in
`conversation`    the protocol, simple and extended, with one client
================  =============================================================================

Invariant: the console knows no server. It shows what the proxy's processes know, and none of its
effects outlives the proxy. A client's rights are looked up anew for each command.
"""
