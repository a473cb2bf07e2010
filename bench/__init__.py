"""``python -m bench``: the proxy measured beside PgBouncer, a direct connection, the extension.

Each measure is a file with a ``run(bench)``: `select_only`, `bulk`, `connecting`, `launching`,
`history`, `sustained`, `rows`, `memory`, `scaling`. They share the `harness` (turns and rounds),
the `targets` (what is measured) and the `results` (numbers, compared with the `goals`).

Invariant: only values measured in the same run, in turns, are compared.
"""
