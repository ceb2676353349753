"""Who uses the cluster and how much: teams and their keys, limits, the ledger. No HTTP, no Ray, no torch."""
