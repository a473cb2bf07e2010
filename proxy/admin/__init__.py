"""Metrics, health checks and the page of jobs, by HTTP; off unless ``admin_listen`` is set.

Invariant: it watches, and all that it changes is that an administrator cancels a job. It knows
neither how many processes there are nor how they talk: that is behind `source.Source`. Only
`metrics` and `site` need what the extra ``admin`` installs, and they are imported only if
``admin_listen`` is set.
"""
