"""A small HTTP service: a JSON API over a model and an index, and a page that uses it."""
