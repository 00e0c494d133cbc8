"""Source and converted model in the same runtime, one runtime after another: `make runtimes` writes the table."""
