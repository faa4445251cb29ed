"""What `benchmark.py` measures, part by part."""
