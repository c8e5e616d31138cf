"""What SACV is measured with; see README.md. Run from the root of the repository: ``python -m benchmarks.learning``."""
