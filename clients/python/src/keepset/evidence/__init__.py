"""Evidence: do compiled tables help? Measured through a real keepsetd, written to docs/results."""
