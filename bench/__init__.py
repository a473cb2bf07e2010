"""``python -m bench``: what the proxy costs and what it gives, measured against its rivals.

Each measure is a file with a ``run(bench)``: `select_only`, `bulk`, `connecting`, `launching`,
`sustained`, `rows`, `memory`, `scaling`. They share the `harness` (turns and rounds), the `targets`
(what is measured) and the `results` (numbers, and the `goals` they are held against).

The rule: only what was measured in the same run, in turns, is compared.
"""
