"""The commands of the package, one per file: each has its options and a `run` that calls the wing for the work."""
