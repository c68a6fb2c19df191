"""What `benchmarks/robustness.py` tries."""
