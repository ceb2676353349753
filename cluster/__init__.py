"""The cluster: places expert groups and routers as Ray actors, keeps them alive, and the `shoal` command line."""
