"""The fault campaign: runs that are hit by faults, and what becomes of them. docs/reliability.md has its results.

`python -m tests.torture --seed 0 --minutes 30` (or `make torture`) goes on where the last call with that seed ended.
"""
