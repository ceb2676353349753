"""Benchmarks: each script prints one JSON object with --json. Nothing here is a test."""
