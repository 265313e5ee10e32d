"""What is not the method: `python -m tools.<name>`, run from the repository's folder."""
