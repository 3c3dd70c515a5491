"""A GPU for a quarter of an hour: what this project most wants to know of one, carried to a machine without network.

`prepare.py` makes the pack, `run.sh` unpacks and runs it, `parts.py` lists the parts, and `__main__.py` runs them.
"""
