"""Training text: files and hub data sets, tokens on disk, batches on devices."""
