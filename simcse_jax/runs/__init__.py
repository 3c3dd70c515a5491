"""The record of a run: folder, checkpoints, log, progress, tracking, figures."""
