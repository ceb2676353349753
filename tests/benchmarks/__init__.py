"""Benchmarks: each script prints one JSON object with --json (DESIGN.md, section 4). Nothing here is a test."""
