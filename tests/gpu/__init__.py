"""Tests that need a CUDA card; each says so and is skipped without one."""
