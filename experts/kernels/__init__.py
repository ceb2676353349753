"""The routed feed-forward network: one file per way to compute it; reference.py is the judge."""
