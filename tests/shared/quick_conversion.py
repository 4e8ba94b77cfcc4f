"""Options of a conversion into experts that takes a second."""

QUICK = {"sparsify": 1, "epochs": 1, "batch": 60, "limit": 60, "router_width": 2}
