"""What `benchmark_latency.py` measures, and its report."""
