"""The commands of the package, one a file: their options, and a `run` that hands over to what does the work."""
