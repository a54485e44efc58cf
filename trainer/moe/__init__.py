"""The mixture-of-experts block: router, experts, and the block that joins them by dispatch."""
