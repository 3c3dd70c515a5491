"""Helpers that the tables and figures of all reports share."""
