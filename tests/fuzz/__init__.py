"""Coverage-guided fuzzing of everything that reads bytes from users or from storage: `make fuzz`, docs/fuzzing.md."""
