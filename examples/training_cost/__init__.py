"""What `benchmark_training.py` measures, and its tables."""
