"""Commands that print the figures of the package: ``python -m benchmarks NAME``."""
