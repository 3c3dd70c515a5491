"""This project beside its peers, on the same work, in one run: `python -m benchmarks --help`.

Each contender runs in a process of its own (`worker.py`), so that a library's threads, memory and imports are its own.
The processes are called in turn (`timing.py`), after they have agreed on what they compute (`compare.py`).
"""
