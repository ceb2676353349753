"""Tests of the experts package."""
