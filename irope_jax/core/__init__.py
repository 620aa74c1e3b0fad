"""Words every room speaks: configuration, token coordinates, run records, comparisons, hosts."""
