"""Metrics, health checks and the page of jobs, by HTTP; off unless ``admin_listen`` is set.

Invariant: it only watches, except that an administrator can cancel a job. It does not know how many
processes there are or how they communicate: `source.Source` hides that. Only `metrics` and `site`
need the extra ``admin``, and they are imported only if ``admin_listen`` is set.
"""
