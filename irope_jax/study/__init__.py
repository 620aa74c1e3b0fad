"""From many run directories to one claim: aggregates, tables, pictures, a page. Reads records only; imports no jax."""
