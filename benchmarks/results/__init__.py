"""The papers' comparisons, run end to end on an encoder that can be had anywhere: `python -m benchmarks.results`.

A cell is one training run or one evaluation. Its figures are kept as a small file, its record; the tables and figures
of the report follow from the records alone.
"""
